"""The benchmark's implementation with torch.compile."""

import torch
from conftest import shapes_config
from detectron2.modeling import build_backbone, build_model
from studies.rivals import compile_blocks
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

GN = "mask_rcnn_R_18_FPN_gn"
NATIVE = ("MODEL.GROUP_NORM.IMPL", "native")


def test_compiled_blocks():
    """Every block and every other convolution with a norm is compiled, with equal outputs."""
    model, native = (build_model(shapes_config(GN, *NATIVE)) for _ in range(2))
    compile_blocks(model)
    compiled = [name for name, m in model.named_modules() if m._compiled_call_impl is not None]
    # Stem and 8 blocks, 4 lateral and 4 output convolutions, 4 in the box head and 4 in the mask's
    assert len(compiled) == 9 + 8 + 8
    native.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.compiler.set_stance("force_eager"):
        assert_close(model.backbone(x)["p2"], native.backbone(x)["p2"])


def test_every_block_is_compiled_in_training_and_in_evaluation(monkeypatch):
    """A ResNet-50 needs more compiled variants of a block than PyTorch's default limit."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_ = torch.nn.Module.compile
    model = build_backbone(shapes_config(GN, "MODEL.RESNETS.DEPTH", "50", *NATIVE))
    with monkeypatch.context() as patch:
        # A counting backend, which runs the graphs without compiling them
        patch.setattr(torch.nn.Module, "compile", lambda m, **k: compile_(m, backend=counter, **k))
        compile_blocks(model)
    blocks = sum(type(m).__name__ in ("BottleneckBlock", "BasicStem") for m in model.modules())
    assert blocks == 17
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model(torch.randn(1, 3, 64, 64))
        trained = counter.frame_count
        model.eval()
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 96))
    assert counter.frame_count > trained > 8
