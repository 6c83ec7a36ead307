"""The backbone under another head of Transformers: it is trained with it, and saved and loaded with it."""

import torch
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from cxr_backbone import CXRInceptionBackbone, CXRInceptionConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def test_upernet_trains_on_it_and_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    ours = CXRInceptionBackbone(CXRInceptionConfig(depth_multiplier=0.1, image_size=96, out_features=STAGES))
    config = UperNetConfig(
        backbone_config=ours.config, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=2
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = ours
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}

    pixel_values, labels = torch.rand(2, 1, 96, 96), torch.randint(2, (2, 96, 96))
    output = model(pixel_values=pixel_values, labels=labels)
    assert output.logits.shape == (2, 2, 96, 96)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    moved = [name for name, parameter in ours.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)  # all stages learn

    model.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.backbone, CXRInceptionBackbone)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model.eval()(pixel_values).logits)
