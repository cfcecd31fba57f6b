"""Routes of models that generate no text: embeddings, ranking, labels, speech. The mapping is ours, not the models'."""
