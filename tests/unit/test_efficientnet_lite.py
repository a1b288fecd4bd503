"""Our EfficientNet-lite is timm's, to the bit."""

import pytest
import torch

from one4all.encoders.efficientnet_lite import EfficientNet


@pytest.mark.parametrize("name", ["lite0", "lite2"])
@pytest.mark.parametrize("size", [64, 75])
def test_network_is_that_of_timm(name, size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(f"tf_efficientnet_{name}", pretrained=False).eval()
    ours = EfficientNet(name).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    image_BCHW = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(ours(image_BCHW), theirs(image_BCHW))
    kinds = [{type(module).__name__ for module in model.modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]  # content hashes are made of these
