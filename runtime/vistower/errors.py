"""Every exception vistower raises on purpose.

::

    VistowerError
    ├── ImageError (ValueError)              a picture cannot be used
    │   ├── ImageDecodeError                 its bytes are not a readable picture
    │   └── ImageFormatError                 its type, shape, dtype or mode is not accepted
    ├── EmptyInputError (ValueError)         an empty batch, folder or glob
    ├── OptionError (ValueError)             an argument has a value that is not allowed
    ├── NoSuchOutputError (AttributeError)   an embedding without the part that was asked for
    ├── ClosedError (RuntimeError)           a closed batcher was asked
    ├── ProcessorConfigError (ValueError)    an option that is not reproduced
    ├── BundleError                          a bundle on disk cannot be used
    │   ├── BundleNotFoundError (FileNotFoundError)
    │   ├── BundleCorruptError               half-written, edited, or a file is missing
    │   ├── BundleUnsupportedError           an unknown format version or architecture
    │   └── GoldenMismatchError              replaying its golden vectors gave other numbers
    ├── MaskError (IndexError)               a patch mask that does not index the tokens
    ├── MissingModelPathError (TypeError)    a mixin without model_path
    ├── TorchOnlyError (AttributeError)      a mixin's model or processor, asked what torch's has
    ├── DeviceError (RuntimeError)           the device asked for cannot be had
    │   ├── ProviderMissingError             the wheel lacks its provider, or two wheels collide
    │   ├── CudaLibraryError                 a CUDA library is missing or of another major version
    │   ├── DriverError                      no NVIDIA driver, too old, or not for this GPU
    │   ├── NoSuchDeviceError                no GPU of that index
    │   ├── DeviceMemoryError (MemoryError)  the model does not fit the device's free memory
    │   ├── NodePlacementError               strict, and part of the graph would run on the CPU
    │   └── PrecisionError (ValueError)      the device cannot compute in the precision asked for
    ├── InferenceError (RuntimeError)        ONNX Runtime failed, or use after fork
    │   ├── BatchMemoryError (MemoryError)   memory ran out, for half the batch too
    │   └── NonFiniteError (ArithmeticError) NaN or infinity in the outputs
    ├── OutputTypeError (RuntimeError)       VISTOWER_OUTPUT asks for what cannot be given
    ├── MissingExtraError (ImportError)      an optional dependency is not installed
    └── ExportError                          nothing was written
        ├── CheckpointNotFoundError (FileNotFoundError)
        ├── CheckpointAccessError (PermissionError)   gated, private, or a refused token
        ├── HubUnreachableError (ConnectionError)     offline, cut off, or the server failed
        ├── CheckpointError (ValueError)              damaged or incomplete checkpoint
        ├── UnsupportedArchitectureError (ValueError)
        ├── ParityError                      a graph disagrees with torch
        └── OutputError (OSError)            no permission or space, or another process writes there
            └── OutputExistsError (FileExistsError)   what is there may not be replaced

Each message says what was asked, what was found, and what to do. Where another exception was
the cause, it is chained (``__cause__``).
"""

from __future__ import annotations

from vistower.printable import printable


class VistowerError(Exception):
    """Base of every exception vistower raises on purpose.

    A message quotes names of files, bundles and checkpoints: what a terminal would act on is
    escaped in it.
    """

    def __init__(self, *arguments: object) -> None:
        """Take a message."""
        super().__init__(*(printable(x) if isinstance(x, str) else x for x in arguments))


class ImageError(VistowerError, ValueError):
    """A picture cannot be used."""


class ImageDecodeError(ImageError):
    """The bytes of a picture cannot be decoded."""


class ImageFormatError(ImageError):
    """A picture's type, shape, dtype or mode is not one the processor accepts."""


class EmptyInputError(VistowerError, ValueError):
    """There is nothing to embed: an empty batch, folder or glob."""


class OptionError(VistowerError, ValueError):
    """An argument of a call has a value that is not allowed."""


class NoSuchOutputError(VistowerError, AttributeError):
    """A part of an embedding that the family or the graph has not, or that was not asked for."""


class ClosedError(VistowerError, RuntimeError):
    """A batcher was used after it was closed."""


class ProcessorConfigError(VistowerError, ValueError):
    """``preprocessor_config.json`` asks for something vistower does not reproduce exactly."""


class BundleError(VistowerError):
    """A bundle on disk cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """No bundle where one was looked for."""


class BundleCorruptError(BundleError):
    """A bundle is half-written, was edited, or misses a file."""


class BundleUnsupportedError(BundleError):
    """A bundle's format version or architecture is not known to this version of vistower."""


class GoldenMismatchError(BundleError):
    """Replaying a bundle's golden vectors gave other numbers than it was certified with."""


class MaskError(VistowerError, IndexError):
    """A patch mask does not index the tokens: another length, another dtype, out of range."""


class MissingModelPathError(VistowerError, TypeError):
    """A mixin was constructed without ``model_path``, and has no default or was given None."""


class TorchOnlyError(VistowerError, AttributeError):
    """A mixin's model, config, processor or array was asked for what only torch's object has."""


class DeviceError(VistowerError, RuntimeError):
    """The device asked for cannot be had; nothing falls back to another one."""


class ProviderMissingError(DeviceError):
    """The ONNX Runtime wheel has no provider for the device, or two wheels overwrite each other."""


class CudaLibraryError(DeviceError):
    """A CUDA library is missing or of another major version; the message names it."""


class DriverError(DeviceError):
    """There is no NVIDIA driver, it does not start, or it is too old."""


class NoSuchDeviceError(DeviceError):
    """There is no GPU of the index asked for."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The device has not enough free memory to open the graph."""


class NodePlacementError(DeviceError):
    """With ``strict``: compute nodes of the graph were placed on the CPU."""


class PrecisionError(DeviceError, ValueError):
    """The device or the bundle cannot compute in the precision asked for."""


class InferenceError(VistowerError, RuntimeError):
    """ONNX Runtime could not run the graph."""


class BatchMemoryError(InferenceError, MemoryError):
    """Memory ran out while a batch was computed, and again for its halves."""


class NonFiniteError(InferenceError, ArithmeticError):
    """The tokens hold NaN or infinity: a reduced precision overflowed, or weights are damaged."""


class OutputTypeError(VistowerError, RuntimeError):
    """``VISTOWER_OUTPUT`` asks for an array type that cannot be given."""


class MissingExtraError(VistowerError, ImportError):
    """An optional dependency is not installed."""


class ExportError(VistowerError):
    """What was to be made was not written: a bundle, a checkpoint or embeddings."""


class CheckpointNotFoundError(ExportError, FileNotFoundError):
    """No checkpoint under the given directory, hub id or revision."""


class CheckpointAccessError(ExportError, PermissionError):
    """The hub refuses the checkpoint: gated, private, or a bad token."""


class HubUnreachableError(ExportError, ConnectionError):
    """The hub cannot be reached, cut the connection, or answered with a server error."""


class CheckpointError(ExportError, ValueError):
    """A checkpoint is damaged or incomplete."""


class UnsupportedArchitectureError(ExportError, ValueError):
    """A checkpoint's model type is not one of the exporter's towers."""


class ParityError(ExportError):
    """An exported graph disagrees with torch + transformers by more than its tolerance."""


class OutputError(ExportError, OSError):
    """An output cannot be written there: no permission, no space, or another process does."""


class OutputExistsError(OutputError, FileExistsError):
    """What is at an output may not be replaced."""
