"""The LLM: a prompt with vision tokens in, words out; transformers or vLLM runs it.

In: a question and the stored or decoded frames. Out: text, piece by piece.
Imports: workers.models, workers.vision.
"""
