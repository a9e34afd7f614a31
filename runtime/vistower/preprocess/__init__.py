"""Pictures to ``pixel_values``, as Hugging Face image processors make them.

- `vistower.preprocess.images`: pictures in, files and arrays;
- `vistower.preprocess.processor`: the processors;
- `vistower.preprocess.resize`: their resize in NumPy; `vistower.preprocess.native`: by a library.
"""
