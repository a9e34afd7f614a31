"""Export of Hugging Face vision towers to vistower bundles; needs the ``export`` extra."""
