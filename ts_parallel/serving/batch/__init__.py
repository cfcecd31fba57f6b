"""Batch inference: tasks, jobs, micro-batches, texts, speech, answers of encoder-decoders. Knows no transport."""
