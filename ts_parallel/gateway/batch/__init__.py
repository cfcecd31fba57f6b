"""KServe's protocol by models of batch inference, and forms for them."""
