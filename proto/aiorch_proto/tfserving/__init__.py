"""TensorFlow Serving's protocol.

``core_pb2``, ``error_pb2`` and ``serving_pb2`` are generated (proto/generate.py); ``service`` and ``names`` are written by hand.
"""
