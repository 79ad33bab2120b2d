"""The admin API: registry, deployments, tuning, access, audit.

The ``*_pb2`` modules are generated (proto/generate.py); ``service`` is written by hand.
"""
