"""TensorFlow Serving's protocol, over gRPC and REST, for every backend and without TensorFlow.

Unmodified ``tensorflow-serving-api`` works against it. Where it differs on purpose:

- a model has one signature, ``serving_default``, with its inputs and outputs under their own names;
- examples of Classify and Regress are taken apart here: features become the model's inputs of the same name. A model
  with one input of strings that no feature is named after gets the serialized examples, as in TensorFlow Serving;
- values out of a type's range, in the wrong list or too many of them are refused instead of cut or ignored;
- the configuration of models is not replaced over this protocol: models come from the repository.
"""
