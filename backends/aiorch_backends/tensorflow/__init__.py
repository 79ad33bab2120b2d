"""TensorFlow models: ``model.savedmodel/`` (signature ``serving_default``) and ``model.keras``.

Names, datatypes and shapes come from the signature or from Keras' inputs and outputs. Parameters: ``signature_name``
(another signature of a SavedModel), ``require_gpu``. TensorFlow's thread pools belong to the process: the first model
that is loaded sets their sizes.
"""

from aiorch_backends.tensorflow.backend import TensorFlowBackend

__all__ = ["TensorFlowBackend"]
