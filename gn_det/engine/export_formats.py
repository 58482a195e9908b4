"""The formats of exported models: how each is written, and run on the machine that wrote it."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError

OPSET = 17
# Key of the metadata in every format
METADATA = "gn_det"

Exported = Callable[[Tensor], Sequence[Any]]


class Format(NamedTuple):
    """A format.

    Attributes:
        file: name of the model's file.
        packages: packages that are needed to write and run it.
        save: writes a module, traced with an image, and its metadata to a path.
        load: returns a function from an image, (3, H, W), to the outputs.
    """

    file: str
    packages: tuple[str, ...]
    save: Callable[[nn.Module, Tensor, Path, dict[str, Any]], None]
    load: Callable[[Path], Exported]

    def check(self, name: str) -> None:
        """Raise an `InputError` if a package is not installed."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise InputError(f"--format {name} needs a package: pip install {' '.join(missing)}")


def save_torchscript(module: nn.Module, image: Tensor, path: Path, metadata: dict) -> None:
    """Write a module for `torch.jit.load`, with the metadata in the extra file `METADATA`."""
    with torch.no_grad():
        traced = torch.jit.trace(module, (image,), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})


def load_torchscript(path: Path) -> Exported:
    """Load a TorchScript file."""
    module = torch.jit.load(str(path))
    return lambda image: module(image)


def save_onnx(module: nn.Module, image: Tensor, path: Path, metadata: dict) -> None:
    """Write an ONNX file, in which height, width and number of objects may vary."""
    import onnx

    names = metadata["outputs"]
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    torch.onnx.export(
        module,
        (image,),
        str(path),
        opset_version=OPSET,
        dynamo=False,
        input_names=["image"],
        output_names=names,
        dynamic_axes=axes,
    )
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata)})
    onnx.save(model, str(path))


def load_onnx(path: Path) -> Exported:
    """Load an ONNX file in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.cpu().numpy()})


def save_openvino(module: nn.Module, image: Tensor, path: Path, metadata: dict) -> None:
    """Write an OpenVINO file by way of ONNX, with its weights in a file `.bin` beside it."""
    import openvino

    intermediate = path.with_suffix(".onnx")
    save_onnx(module, image, intermediate, metadata)
    model = openvino.convert_model(str(intermediate))
    model.set_rt_info(json.dumps(metadata), METADATA)
    openvino.save_model(model, str(path), compress_to_fp16=False)
    intermediate.unlink()


def load_openvino(path: Path) -> Exported:
    """Load an OpenVINO file on the CPU, for computation in float32."""
    import openvino

    model = openvino.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # The results are views of memory that the next call overwrites
    return lambda image: [np.array(v) for v in model({"image": image.cpu().numpy()}).values()]


FORMATS = {
    "torchscript": Format("model.ts", (), save_torchscript, load_torchscript),
    "onnx": Format("model.onnx", ("onnx", "onnxruntime"), save_onnx, load_onnx),
    "openvino": Format("model.xml", ("onnx", "openvino"), save_openvino, load_openvino),
}
