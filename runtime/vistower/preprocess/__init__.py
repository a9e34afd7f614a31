"""Pictures to ``pixel_values``, as Hugging Face image processors make them.

- `vistower.preprocess.images`: files in; `vistower.preprocess.arrays`: arrays and tensors in;
- `vistower.preprocess.classes`: the processors that are reproduced, as data;
- `vistower.preprocess.config`: what a configuration asks of one;
- `vistower.preprocess.convert`: what a processor reads a picture as, or why not;
- `vistower.preprocess.frame`: sizes, crops and padding; `vistower.preprocess.scaling`: rescaling
  and normalization;
- `vistower.preprocess.torchvision_arithmetic`, `vistower.preprocess.pillow_arithmetic`,
  `vistower.preprocess.dinov3_arithmetic`: the three ways to compute pixels;
- `vistower.preprocess.resize`: their resize in NumPy; `vistower.preprocess.native`: by a library;
- `vistower.preprocess.processor`: a picture through all of it.
"""
