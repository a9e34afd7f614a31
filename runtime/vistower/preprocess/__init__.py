"""Pictures to ``pixel_values``, as Hugging Face image processors make them.

- `vistower.preprocess.images`: pictures in, files and arrays;
- `vistower.preprocess.config`: what a processor's configuration asks for;
- `vistower.preprocess.processor`: a picture through a processor;
- `vistower.preprocess.torchvision_levels`, `vistower.preprocess.pillow_levels`,
  `vistower.preprocess.rescaled_floats`: the arithmetic of the three references;
- `vistower.preprocess.resize`: their resize in NumPy; `vistower.preprocess.native`: by a library.
"""
