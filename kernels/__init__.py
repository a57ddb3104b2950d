"""Triton kernels of honeytrace, installed as the package ``honeytrace.kernels``.

One module for each op, each with its kernels and the function that launches them on plain tensors:
`feature_distance`, `sign_hash`, `watermark_mix`, `compose`. `numerics` and `philox` are what they share,
`configs` is the table of tile sizes, `language` is the door to Triton. Nothing here knows of schemas,
autograd or backends; that is `honeytrace.ops.triton_backend`.

Importing this package imports nothing; importing one of its modules imports Triton.
"""
