"""resolve_checkpoint against a hub on loopback, in a process of its own each time.

huggingface_hub reads its endpoint, cache and offline switch from the environment when it is
imported, so a fresh process with that environment is what a user's command line is.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vistower
import vistower_export
from hub_server import ALWAYS, HubServer, Repo, commit_sha
from vistower import errors
from vistower_export.pictures import SAMPLES
from vistower_export.source import Checkpoint, resolve_checkpoint

TOWER = "someone/tower"
GATED = "facebook/dinov3-vits16-pretrain-lvd1689m"
GRANTED = "hf_GrantedTokenOfTheTest"
UNGRANTED = "hf_UngrantedTokenOfTheTest"
UNKNOWN = "hf_UnknownTokenOfTheTest"

CONFIGS = {
    "config.json": b'{"model_type": "clip_vision_model"}',
    "preprocessor_config.json": b'{"image_processor_type": "CLIPImageProcessor"}',
}


def safetensors(size: int = 40_000) -> bytes:
    """A file of the format with one tensor of ``size`` bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(i % 251 for i in range(size))


WEIGHTS = safetensors()
FILES = {
    **CONFIGS,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"torch",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "model.onnx": b"onnx",
    "README.md": b"# Tower",
}

SCRIPT = """
import json, sys, traceback
from dataclasses import asdict
arguments = json.load(sys.stdin)
from vistower_export.source import resolve_checkpoint
from vistower.errors import VistowerError
answer = {}
try:
    answer["checkpoint"] = asdict(resolve_checkpoint(**arguments))
except VistowerError as error:
    traceback.print_exc()
    answer |= {"error": type(error).__name__, "message": str(error),
               "cause": type(error.__cause__).__name__}
answer["heavy"] = sorted({"torch", "transformers", "onnx"} & set(sys.modules))
print(json.dumps(answer, default=str))
"""


@dataclass
class Outcome:
    checkpoint: Checkpoint | None
    error: type[errors.VistowerError] | None
    message: str
    cause: str
    heavy: list[str]
    output: str


class User:
    """Someone at a terminal: a home directory with a cache, and an endpoint."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join(
                str(Path(package.__path__[0]).parent) for package in (vistower, vistower_export)
            ),
        }

    def resolve(
        self, model: str, *, environment: Mapping[str, str] | None = None, **arguments: Any
    ) -> Outcome:
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps({"model": model, **arguments}),
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        answer = json.loads(process.stdout.splitlines()[-1])
        checkpoint = None
        if found := answer.get("checkpoint"):
            checkpoint = Checkpoint(**found | {"directory": Path(found["directory"])})
        return Outcome(
            checkpoint=checkpoint,
            error=getattr(errors, answer["error"]) if "error" in answer else None,
            message=answer.get("message", ""),
            cause=answer.get("cause", ""),
            heavy=answer["heavy"],
            output=process.stdout + process.stderr,
        )

    def succeed(self, model: str, **arguments: Any) -> Checkpoint:
        outcome = self.resolve(model, **arguments)
        assert outcome.checkpoint is not None, outcome.output
        return outcome.checkpoint

    def fail(self, error: type[Exception], model: str, **arguments: Any) -> Outcome:
        outcome = self.resolve(model, **arguments)
        assert outcome.error is error, outcome.output
        assert outcome.cause != "NoneType", "the original cause is chained"
        return outcome


@pytest.fixture
def hub() -> Iterator[HubServer]:
    repos = {TOWER: Repo.of(FILES), GATED: Repo.of(FILES, label="gated", gated=True)}
    with HubServer(repos, tokens={GRANTED: [GATED], UNGRANTED: []}) as server:
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub.endpoint, tmp_path / "home")


def names(checkpoint: Checkpoint) -> set[str]:
    return {path.name for path in checkpoint.directory.iterdir()}


def test_only_the_needed_files_are_downloaded_once_and_serve_offline(
    hub: HubServer, user: User
) -> None:
    outcome = user.resolve(TOWER)
    checkpoint = outcome.checkpoint
    assert checkpoint is not None, outcome.output
    assert checkpoint.source == TOWER
    assert checkpoint.name == "tower"
    assert checkpoint.revision == commit_sha("first")
    assert not checkpoint.random_weight
    assert names(checkpoint) == {*CONFIGS, "model.safetensors"}
    assert (checkpoint.directory / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(hub.downloaded()) == sorted([*CONFIGS, "model.safetensors"])
    assert outcome.heavy == [], "the resolver must start without torch and transformers"

    hub.requests.clear()
    assert user.succeed(TOWER) == checkpoint
    assert hub.downloaded() == []
    assert hub.requests, "a second run asks whether the branch has moved"

    hub.requests.clear()
    assert user.succeed(TOWER, offline=True) == checkpoint
    assert user.succeed(TOWER, environment={"HF_HUB_OFFLINE": "1"}) == checkpoint
    assert user.succeed(TOWER, offline=True, revision=commit_sha("first")) == checkpoint
    cold = user.fail(errors.HubUnreachableError, TOWER, offline=True, revision="v2")
    assert f"vistower export {TOWER} --revision v2" in cold.message
    assert hub.requests == []


def test_offline_with_a_cold_cache_says_what_to_run_online(hub: HubServer, user: User) -> None:
    outcome = user.fail(errors.HubUnreachableError, TOWER, environment={"HF_HUB_OFFLINE": "1"})
    assert f"`vistower export {TOWER}` once online" in outcome.message
    assert str(user.home) in outcome.message
    assert hub.requests == []


def test_offline_with_half_a_checkpoint_says_so(user: User) -> None:
    (user.succeed(TOWER).directory / "model.safetensors").unlink()
    outcome = user.fail(errors.HubUnreachableError, TOWER, offline=True)
    assert "only in part" in outcome.message


def test_a_revision_is_a_branch_or_a_sha_and_the_sha_is_recorded(
    hub: HubServer, user: User
) -> None:
    repo = hub.repos[TOWER]
    larger = safetensors(50_000)
    repo.commits[commit_sha("second")] = {**FILES, "model.safetensors": larger}
    repo.refs["refs/pr/7"] = commit_sha("second")

    by_branch = user.succeed(TOWER, revision="refs/pr/7")
    assert by_branch.revision == commit_sha("second")
    assert (by_branch.directory / "model.safetensors").read_bytes() == larger
    assert user.succeed(TOWER, revision=commit_sha("first")).revision == commit_sha("first")

    assert user.succeed(TOWER).revision == commit_sha("first")
    repo.refs["main"] = commit_sha("second")
    assert user.succeed(TOWER).revision == commit_sha("second")
    assert user.succeed(TOWER, offline=True).revision == commit_sha("second")


def test_sharded_safetensors_come_with_every_shard(hub: HubServer, user: User) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    files = {
        **CONFIGS,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **dict.fromkeys(shards, WEIGHTS),
        "pytorch_model.bin": b"torch",
    }
    hub.repos[TOWER] = Repo.of(files)
    assert names(user.succeed(TOWER)) == {*files} - {"pytorch_model.bin"}

    partial = {name: content for name, content in files.items() if name != shards[1]}
    hub.repos["someone/partial"] = Repo.of(partial)
    outcome = user.resolve("someone/partial")
    assert outcome.error is errors.CheckpointError
    assert shards[1] in outcome.message


def test_a_repository_without_safetensors_gives_its_bin(hub: HubServer, user: User) -> None:
    files = {**CONFIGS, "pytorch_model.bin": b"torch", "flax_model.msgpack": b"flax"}
    hub.repos[TOWER] = Repo.of(files)
    assert names(user.succeed(TOWER)) == {*CONFIGS, "pytorch_model.bin"}
    assert "flax_model.msgpack" not in hub.downloaded()


def test_every_file_that_says_which_processor_is_downloaded(hub: HubServer, user: User) -> None:
    """transformers 5 takes the nested one, 4.57 the old one; offline as online."""
    nested = b'{"image_processor": {"image_processor_type": "BitImageProcessor"}}'
    hub.repos[TOWER] = Repo.of({**FILES, "processor_config.json": nested, "vocab.json": b"{}"})
    expected = {*CONFIGS, "processor_config.json", "model.safetensors"}
    assert names(user.succeed(TOWER)) == expected
    assert sorted(hub.downloaded()) == sorted(expected)
    assert names(user.succeed(TOWER, offline=True)) == expected

    only = {name: FILES[name] for name in FILES if name != "preprocessor_config.json"}
    hub.repos["someone/composite"] = Repo.of({**only, "processor_config.json": nested})
    expected = {"config.json", "processor_config.json", "model.safetensors"}
    assert names(user.succeed("someone/composite")) == expected
    hub.requests.clear()
    assert names(user.succeed("someone/composite", offline=True)) == expected
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "weights"])
def test_a_repository_that_lacks_a_file_is_told_which(
    hub: HubServer, user: User, missing: str
) -> None:
    gone = {"model.safetensors", "pytorch_model.bin"} if missing == "weights" else {missing}
    hub.repos[TOWER] = Repo.of({name: FILES[name] for name in FILES if name not in gone})
    outcome = user.resolve(TOWER)
    assert outcome.error is errors.CheckpointError
    assert missing in outcome.message
    assert "flax_model.msgpack" in outcome.message, "the message says what there is"
    assert hub.downloaded() == []


def test_a_cut_connection_is_resumed(hub: HubServer, user: User) -> None:
    hub.faults.cuts["model.safetensors"] = 1
    checkpoint = user.succeed(TOWER)
    assert (checkpoint.directory / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloaded().count("model.safetensors") == 2


def test_a_connection_cut_every_time_ends_and_leaves_nothing_half_made(
    hub: HubServer, user: User
) -> None:
    hub.faults.cuts["model.safetensors"] = ALWAYS
    outcome = user.fail(errors.HubUnreachableError, TOWER)
    assert "run the same command again" in outcome.message
    assert len(hub.requests) < 40
    assert not list(user.home.rglob("snapshots/*/model.safetensors"))

    hub.faults.cuts.clear()
    checkpoint = user.succeed(TOWER)
    assert (checkpoint.directory / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "where",
    # huggingface_hub backs off for 23 seconds before it gives a file up.
    ["/api/", pytest.param("/resolve/", marks=pytest.mark.slow)],
)
def test_a_failing_hub_is_unreachable_and_a_healthy_one_serves(
    hub: HubServer, user: User, where: str
) -> None:
    hub.faults.status[where] = 503
    outcome = user.fail(errors.HubUnreachableError, TOWER)
    assert "HTTP 503" in outcome.message
    assert 1 < len(hub.requests) < 20, "tried again, and not for ever"
    hub.faults.status.clear()
    assert user.succeed(TOWER).revision == commit_sha("first")


def test_a_hub_that_is_down_is_unreachable_even_with_a_warm_cache(
    hub: HubServer, user: User
) -> None:
    checkpoint = user.succeed(TOWER)
    hub.stop()
    outcome = user.fail(errors.HubUnreachableError, TOWER)
    assert hub.endpoint in outcome.message
    assert "--offline" in outcome.message
    assert user.succeed(TOWER, offline=True) == checkpoint


def test_a_silent_hub_times_out(hub: HubServer, user: User) -> None:
    hub.faults.silent = True
    begin = time.monotonic()
    outcome = user.fail(errors.HubUnreachableError, TOWER, environment={"HF_HUB_ETAG_TIMEOUT": "1"})
    assert "timed out" in outcome.message.lower()
    assert time.monotonic() - begin < 15


def test_an_answer_that_is_no_hub_is_unreachable(hub: HubServer, user: User) -> None:
    hub.faults.page = True
    user.fail(errors.HubUnreachableError, TOWER)


def test_a_gated_model_needs_access_and_a_token(hub: HubServer, user: User) -> None:
    anonymous = user.fail(errors.CheckpointAccessError, GATED)
    assert "HTTP 401" in anonymous.message
    for remedy in ("Request access", f"{hub.endpoint}/{GATED}", "--token", "HF_TOKEN", "hf auth"):
        assert remedy in anonymous.message

    refused = user.fail(errors.CheckpointAccessError, GATED, token=UNGRANTED)
    assert "HTTP 403" in refused.message
    assert UNGRANTED not in refused.output

    hub.requests.clear()
    by_name = user.succeed("dinov3-vits16", token=GRANTED)
    assert by_name.source == GATED
    assert by_name.name == GATED.rpartition("/")[2]
    cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert {request.token for request in cdn} == {None}, "the token goes to the hub only"
    assert {request.token for request in hub.requests if request not in cdn} == {GRANTED}
    assert user.succeed(GATED, environment={"HF_TOKEN": GRANTED}) == by_name


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_wrong_token_is_refused_and_not_shown(hub: HubServer, user: User, given: str) -> None:
    if given == "argument":
        outcome = user.fail(errors.CheckpointAccessError, TOWER, token=UNKNOWN)
        assert "the given token" in outcome.message
    else:
        environment = {"HF_TOKEN": UNKNOWN}
        outcome = user.fail(errors.CheckpointAccessError, TOWER, environment=environment)
        assert "the token of HF_TOKEN" in outcome.message
    assert "expired" in outcome.message
    assert UNKNOWN not in outcome.output
    assert {request.token for request in hub.requests} == {UNKNOWN}


@pytest.mark.parametrize("token", ["hf_Secret\nToken", " hf_SecretToken", "hf_S\u00e9cret", ""])
def test_a_malformed_token_is_refused_unsent_and_not_shown(token: str) -> None:
    with pytest.raises(errors.CheckpointAccessError) as caught:
        resolve_checkpoint(TOWER, token=token)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("token", [None, GRANTED])
def test_a_repository_that_is_not_there_is_not_found(
    hub: HubServer, user: User, token: str | None
) -> None:
    outcome = user.fail(errors.CheckpointNotFoundError, "someone/nothing", token=token)
    assert "someone/nothing" in outcome.message
    assert "spelling" in outcome.message
    assert GRANTED not in outcome.output


def test_a_private_repository_needs_its_token(hub: HubServer, user: User) -> None:
    hub.repos["someone/private"] = Repo.of(FILES, private=True)
    hub.tokens[GRANTED] |= {"someone/private"}
    assert "--token" in user.fail(errors.CheckpointNotFoundError, "someone/private").message
    assert user.succeed("someone/private", token=GRANTED).name == "private"


def test_a_revision_that_is_not_there_is_not_found(hub: HubServer, user: User) -> None:
    outcome = user.fail(errors.CheckpointNotFoundError, TOWER, revision="v9")
    assert "'v9'" in outcome.message
    assert hub.downloaded() == []


def test_a_cache_that_cannot_be_written_is_not_a_network_failure(
    user: User, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    outcome = user.fail(errors.ExportError, TOWER, cache_dir=str(tmp_path / "file" / "cache"))
    assert "cannot be saved" in outcome.message


def test_a_damaged_file_in_the_cache_is_named_as_the_one_to_delete(
    hub: HubServer, user: User
) -> None:
    hub.repos[TOWER] = Repo.of({**FILES, "model.safetensors": WEIGHTS[:-1]})
    outcome = user.resolve(TOWER)
    assert outcome.error is errors.CheckpointError
    assert "Delete it" in outcome.message
    assert "/blobs/" in outcome.message


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "clip-vit-base-patch32"
    directory.mkdir()
    for name in (*CONFIGS, "model.safetensors"):
        (directory / name).write_bytes(FILES[name])
    return directory


def test_a_local_directory_is_taken_however_it_is_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Checkpoint(directory, str(directory), "clip-vit-base-patch32", None, False)
    assert resolve_checkpoint(str(directory)) == expected
    assert resolve_checkpoint(f"{directory}///") == expected
    monkeypatch.chdir(directory)
    assert resolve_checkpoint(".") == expected
    monkeypatch.chdir(directory.parent)
    assert resolve_checkpoint("./clip-vit-base-patch32/") == expected
    assert resolve_checkpoint("clip-vit-base-patch32") == expected, "a directory wins over a name"
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve_checkpoint("~/clip-vit-base-patch32") == expected


def test_a_symbolic_link_is_known_by_its_own_name(directory: Path) -> None:
    link = directory.parent / "tower"
    link.symlink_to(directory)
    assert resolve_checkpoint(str(link)).name == "tower"


def test_a_random_weight_label_is_seen(directory: Path) -> None:
    (directory / "config.json").write_text('{"vistower_random_weights": true}')
    assert resolve_checkpoint(str(directory)).random_weight


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.json", "config.json"),
        ("preprocessor_config.json", "preprocessor_config.json and no processor_config.json"),
    ],
)
def test_a_local_directory_that_lacks_a_config_is_told_which(
    directory: Path, missing: str, told: str
) -> None:
    (directory / missing).unlink()
    with pytest.raises(errors.CheckpointError, match=rf"has no {told}.*model\.safetensors"):
        resolve_checkpoint(str(directory))


def test_a_damaged_processor_config_is_named(directory: Path) -> None:
    (directory / "processor_config.json").write_text("{")
    with pytest.raises(errors.CheckpointError, match=r"/processor_config\.json' is not valid JSON"):
        resolve_checkpoint(str(directory))
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text("{}")
    assert resolve_checkpoint(str(directory)).directory == directory


def test_a_local_directory_without_weights_is_told_so(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"no weights.*model\.fp16\.safetensors"):
        resolve_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (WEIGHTS[:4], "4 bytes, too few"),
        (WEIGHTS[:30], "30 bytes, too few"),
        (WEIGHTS[:-1], "its header promises"),
        (WEIGHTS + b"\0", "its header promises"),
        (struct.pack("<Q", 2) + b"{]", "unreadable header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "unreadable header"),
        (b"", "is empty"),
        (b"version 1 of a pointer", "git lfs pull"),
    ],
)
def test_damaged_weights_are_found_before_anything_is_loaded(
    directory: Path, content: bytes, found: str
) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(errors.CheckpointError, match=found):
        resolve_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("index", "found"),
    [
        ('{"weight_map": {"a": "model-2.safetensors"}}', r"has no model-2\.safetensors"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "outside its directory"),
        ('{"weight_map": {}}', "names no shards"),
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
    ],
)
def test_a_bad_index_is_refused(directory: Path, index: str, found: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(errors.CheckpointError, match=found):
        resolve_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("./nothing", "does not exist"),
        ("/nothing/at/all", "does not exist"),
        ("~/nothing-here", "does not exist"),
        ("owner/name/", "does not exist"),
        ("owner/name/more", "nor a valid hub id"),
        ("owner/na me", "nor a valid hub id"),
        ("clip-vit-base-patch23", "Did you mean 'clip-vit-base-patch32'"),
        ("", "An empty model name"),
        (__file__, "is a file"),
    ],
)
def test_a_name_that_is_neither_directory_nor_hub_id(model: str, found: str) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=found):
        resolve_checkpoint(model, offline=True)


def test_a_local_directory_has_no_revision(directory: Path) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="has no revisions"):
        resolve_checkpoint(str(directory), revision="main")


def test_the_server_is_bounded_in_requests_and_time(tmp_path: Path) -> None:
    with HubServer({TOWER: Repo.of(FILES)}, max_requests=0) as server:
        User(server.endpoint, tmp_path).fail(errors.HubUnreachableError, TOWER)
    with HubServer({}, lifetime=0.2) as server:
        assert server.stopped.wait(5)


def cli(user: User, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vistower.cli", *arguments]
    return subprocess.run(
        command, env=user.environment | environment, capture_output=True, text=True, check=False
    )


def test_from_a_gated_hub_id_to_the_mixin(
    hub: HubServer, user: User, dinov3_checkpoint: Path
) -> None:
    hub.repos[GATED] = Repo.of_directory(dinov3_checkpoint, gated=True)
    refused = cli(user, "export", GATED)
    assert refused.returncode == 2
    assert "gated" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    assert "Traceback" not in refused.stderr

    exported = cli(user, "export", GATED, HF_TOKEN=GRANTED)
    assert exported.returncode == 0, exported.stderr
    hub.requests.clear()
    # The bundle is found under the id, with no hub asked and no torch loaded.
    program = f"""
import sys
from vistower import DINOv3Mixin
mixin = DINOv3Mixin(model_path={GATED!r}, device="cpu")
features = mixin.get_features({str(SAMPLES[0])!r})
print(features.shape, mixin.model.encoder.bundle.manifest.source.revision, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=user.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split(") ") == ["(196, 64", f"{commit_sha('first')} False\n"]
    assert hub.requests == []

    offline = cli(user, "export", GATED, "--offline", "--overwrite")
    assert offline.returncode == 0, offline.stderr
    assert hub.requests == []
