"""Top-1 and top-5 accuracy, measured by Detectron2's `inference_on_dataset`."""

from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy in percent; with fewer than 6 classes top-5 is 100."""

    def reset(self) -> None:
        self._hits = {1: 0, 5: 0}
        self._seen = 0

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Count correct predictions.

        Args:
            inputs: each with the class index "label".
            outputs: each with "logits" of shape (classes,).
        """
        for image, output in zip(inputs, outputs, strict=True):
            logits = output["logits"]
            best = logits.topk(min(5, len(logits))).indices.tolist()
            for k in self._hits:
                self._hits[k] += image["label"] in best[:k]
        self._seen += len(inputs)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Accuracy over the images of all processes.

        Returns:
            {"accuracy": {"top1": percent, "top5": percent}} on the main process, {} on others.
        """
        counts = comm.gather((self._hits, self._seen))
        if not comm.is_main_process():
            return {}
        seen = sum(seen for _, seen in counts)
        hits = {k: sum(hits[k] for hits, _ in counts) for k in self._hits}
        return {"accuracy": {f"top{k}": 100 * count / seen for k, count in hits.items()}}
