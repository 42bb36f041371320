"""The LLM: answers a question about frames, run by transformers or vLLM.

In: a question, and stored or decoded frames. Out: text, piece by piece.
Imports: workers.models, workers.vision.
"""
