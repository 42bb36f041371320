"""Frames and pictures as vectors: CLIP, LLaVA-Mini's compressor and pre-fusion, VisionZip.

In: FrameBatch. Out: TokenBatch: vision tokens, compressor outputs, patch rows and search keys.
Imports: workers.decode, workers.models.
"""
