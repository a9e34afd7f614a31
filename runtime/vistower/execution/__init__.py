"""Where and how a graph runs: everything between a bundle's graph and its numbers.

================= ===============================================================================
``session``       one graph on one device; `Session.run` is the only way in
``device``        what a user may ask for: ``cpu``, ``cuda:1``, ``providers=[...]``
``loading``       makes ONNX Runtime's session and reads back what it became
``providers``     `SessionOptions`, and how they are spelled for ONNX Runtime
``placement``     which nodes went to which execution provider
``cuda_machine``  the driver, the GPUs and the CUDA libraries of this machine
``cuda_problems`` what keeps a device from being used, and the remedy; what ``auto`` takes
``openvino``      options of the OpenVINO provider
``tensorrt``      options and engine cache of the TensorRT provider
``cpu``           the CPU's instruction sets
``binding``       IO binding, batch buckets, CUDA graphs
``memory``        page-locked and device memory
``workers``       one thread per GPU
``replicas``      several devices
``finite``        the guard against NaN and infinity
``ort``           the only importer of onnxruntime
================= ===============================================================================
"""
