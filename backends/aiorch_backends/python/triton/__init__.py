"""Models written for Triton's python backend: ``model.py`` with a class ``TritonPythonModel``, unchanged.

``utilities`` makes what such a model imports as ``triton_python_backend_utils``; ``instance`` drives the model. Names
and meanings are those of https://github.com/triton-inference-server/python_backend.
"""
