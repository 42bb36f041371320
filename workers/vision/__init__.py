"""Frames, pictures and texts as vectors: CLIP, LLaVA-Mini's compressor and pre-fusion, VisionZip.

In: FrameBatch, or the text or picture of a search. Out: TokenBatch (vision tokens, compressor outputs, patch rows,
search keys), or a search key.
Imports: workers.decode, workers.models.
"""
