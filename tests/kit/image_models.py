"""Small classifiers of images, and a detector, in which every weight matters."""

import torch
import transformers

DEPTHS = {"depths": [1, 2, 1, 1], "num_labels": 6}
STAGES = {"hidden_sizes": [16, 24, 24, 32], **DEPTHS}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 16, "patch_size": 8}
SMALL |= {"num_labels": 6}
MODELS = {
    "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=8, **STAGES)),
    "basic resnet": lambda: resnet(),
    "mobilenet_v2": lambda: transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(depth_multiplier=0.1, num_labels=6, depth_divisible_by=4, min_depth=4)
    ),
    "poolformer": lambda: transformers.PoolFormerForImageClassification(
        transformers.PoolFormerConfig(**STAGES, mlp_ratio=2.0)
    ),
    "regnet": lambda: transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=8, groups_width=8, layer_type="y", **STAGES)
    ),
    "convnext": lambda: convnext(),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL, intermediate_size=32)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)),
    "detr": lambda: transformers.DetrForObjectDetection(detr()),
    "vit": lambda: vit(),
    "deit": lambda: deit(),
    "swin": lambda: swin(),
}  # fmt: skip


def vit(**sizes):
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL | {"intermediate_size": 32} | sizes))


def deit(**sizes):
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL | {"intermediate_size": 32} | sizes))


def swin(width=8, heads=(2, 4), image_size=16):
    """Two stages of windows of 2 x 2 patches, every other one shifted; of 16 x 16 pixels, on 8 x 8 and 4 x 4."""
    sizes = {"embed_dim": width, "depths": [2, 2], "num_heads": list(heads), "window_size": 2, "mlp_ratio": 2.0, "patch_size": 2}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, image_size=image_size, num_labels=6))


def resnet(sizes=STAGES["hidden_sizes"]):
    config = transformers.ResNetConfig(embedding_size=8, layer_type="basic", hidden_sizes=list(sizes), **DEPTHS)
    return transformers.ResNetForImageClassification(config)


def convnext(sizes=STAGES["hidden_sizes"]):
    config = transformers.ConvNextConfig(hidden_sizes=list(sizes), **DEPTHS, layer_scale_init_value=0.5)
    return transformers.ConvNextForImageClassification(config)


def detr(heads=4):
    backbone = transformers.ResNetConfig(embedding_size=8, **STAGES, out_features=["stage4"])
    numbers = {f"{part}_attention_heads": heads for part in ("encoder", "decoder")}
    sizes = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in {"layers": 1, "ffn_dim": 16}.items()}
    return transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        num_queries=3, **numbers, **sizes,
    )  # fmt: skip


def made(name):
    """A model with weights of which each matters, and statistics of batch norms as after training."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for own, tensor in model.state_dict().items():
        if "running_var" in own:
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and (tensor.dim() == 1 or "layer_scale" in own):
            tensor.uniform_(-0.5, 1.5)
        elif tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=(2 / tensor[0].numel()) ** 0.5)
    return model.eval()


def looked(model, size=32):
    size = getattr(model.config, "image_size", size)
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return model(pixel_values=pixels).logits
