"""The V2 inference protocol with its extensions.

``inference_pb2`` and ``model_config_pb2`` are generated (proto/generate.py); ``service`` is written by hand.
"""
