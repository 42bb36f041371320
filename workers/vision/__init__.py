"""Frames and pictures as vectors: CLIP, LLaVA-Mini's compressor and pre-fusion, VisionZip.

In: FrameBatch, or a text or picture that is searched for. Out: TokenBatch (vision tokens, compressor outputs, patch
rows, search keys), or a search key.
Imports: workers.decode, workers.models.
"""
