"""TorchServe entry file for embeddings, classifiers, rerankers, vision, encoders and speech: stages, micro-batches.

torch-model-archiver --handler handlers/batch_inference.py --config-file model-configs/embedding-pp2-cpu.yaml …

For pre- and postprocessing of your own, archive a file of your own that derives from `BatchInferenceHandler`:

    class MyHandler(BatchInferenceHandler):
        def preprocess(self, item):
            return {"pixel_values": my_transform(item.body)}

        def postprocess(self, output):
            return {"is_cat": bool(output[281] > output[207])}

    _handler = MyHandler()
"""

from typing import Any

from ts_parallel import BatchInferenceHandler

_handler = BatchInferenceHandler()


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[str]:
    """Called once without data to load the model, then for every batch."""
    return _handler.handle(data, context)
