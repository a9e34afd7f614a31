"""The same work on every backend a user could pick, in one run: `scripts/bench`.

One process per backend and round, in alternating order; each backend's numbers are compared with
torch's before its time counts. `models` and `backends` say what is measured and with what,
`artifacts` makes the files all of them share, `worker` is one process, `run` starts them,
`results` is what comes out, `report` and `plots` show it.
"""
