"""The networks of the coverage benchmark: torchvision, timm, transformers, single operations; randomly initialised.

No architecture is adapted and nothing is downloaded. Output layers have 13 classes or 131 words, widths that occur
nowhere else: that is how an engine which must be told them finds them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TIMM_FUSED_ATTN", "0")  # attention in plain operators, so that a peer can trace it too

import language
import operations
import torch
from torch import Tensor, nn

CLASSES, VOCABULARY = 13, 131

TORCHVISION = """
alexnet vgg11 vgg16_bn resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 densenet169
squeezenet1_0 squeezenet1_1 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5
mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf
regnet_y_800mf convnext_tiny vit_b_16 swin_t swin_v2_t maxvit_t fcn_resnet50 deeplabv3_resnet50
deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b swin3d_t""".split()
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large".split()
VIDEO = {"r3d_18": 64, "mc3_18": 64, "r2plus1d_18": 64, "s3d": 224, "mvit_v1_b": 224, "swin3d_t": 64}
WHOLE_IMAGE = "vit_b_16 swin_t swin_v2_t maxvit_t".split()

TIMM = """
resnet18 resnet50d seresnet50 res2net50_26w_4s densenet121 vit_tiny_patch16_224 resnest14d pit_ti_224 levit_128s
tf_efficientnetv2_b0 coat_tiny mobilenetv3_small_100 pvt_v2_b0 swin_tiny_patch4_window7_224 ghostnet_100
rexnet_100 regnety_002 mvitv2_tiny volo_d1_224 nf_resnet26 cspresnet50 ese_vovnet19b_dw dla34 hrnet_w18_small
efficientformer_l1 repvgg_a0 fastvit_t8 convnext_atto edgenext_xx_small poolformer_s12 mobilevit_xxs
convmixer_768_32 mixer_s16_224 lambda_resnet26t beit_base_patch16_224 xcit_nano_12_p16_224 bat_resnext26ts
botnet26t_256 caformer_s18 cait_xxs24_224 coatnet_nano_rw_224 convit_tiny convnextv2_atto crossvit_tiny_240
cs3darknet_s davit_tiny deit_tiny_distilled_patch16_224 deit3_small_patch16_224 dpn68 eca_nfnet_l0 ecaresnet26t
efficientformerv2_s0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fbnetc_100 focalnet_tiny_srf
gcvit_xxtiny gernet_s gmixer_24_224 gmlp_ti16_224 halonet26t hgnetv2_b0 hiera_tiny_224 inception_next_atto
inception_v4 lcnet_050 legacy_seresnext26_32x4d mambaout_femto maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256
mixnet_s mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0 mobilevitv2_050 nest_tiny nextvit_small
rdnet_tiny repghostnet_050 repvit_m0_9 resmlp_12_224 resnetv2_50 samvit_base_patch16_224 sebotnet33ts_256
selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swinv2_tiny_window8_256
swinv2_cr_tiny_ns_224 tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small
twins_svt_small vgg11_bn visformer_tiny vitamin_small_224 vit_relpos_small_patch16_224 vit_small_resnet26d_224
vit_base_patch16_rope_224 xception41 xcit_nano_12_p8_224""".split()
CHANGED = {
    "beit_base_patch16_224": {"depth": 3},
    "vit_base_patch16_rope_224": {"depth": 3},
    "samvit_base_patch16_224": {"depth": 4},
    "deit3_small_patch16_224": {"depth": 4},
    "vit_relpos_small_patch16_224": {"depth": 4},
}  # fewer layers of the same kind, for time
WHOLE_TIMM = """bat_resnext26ts lambda_resnet26t mvitv2_tiny volo_d1_224 botnet26t_256 halonet26t
sebotnet33ts_256 hiera_tiny_224""".split()


@dataclass(frozen=True)
class Network:
    """One network of the suite.

    Attributes:
        name: `suite/name`.
        build: Makes the network and its example inputs.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]]

    @property
    def suite(self) -> str:
        """The suite it belongs to."""
        return self.name.partition("/")[0]


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make the network's output."""
    widths = (CLASSES, VOCABULARY)
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    found = [m for m in model.modules() if isinstance(m, layers)]
    return [m for m in found if getattr(m, "out_features", getattr(m, "out_channels", 0)) in widths]


def main_output(output: Any) -> Tensor:
    """The tensor that a network is judged by."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, dict):
        return output["out"] if "out" in output else next(iter(output.values()))
    return main_output(output[0])


def picture(*shape: int) -> Tensor:
    """A random image or film."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def from_torchvision(name: str) -> Any:
    """A network of torchvision."""
    import torchvision

    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if name in SEGMENTATION:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    model = torchvision.models.get_model(name, **options)
    if name in VIDEO:
        return model, (picture(3, 16, VIDEO[name], VIDEO[name]),)
    size = 224 if name in WHOLE_IMAGE else 139 if name == "inception_v3" else 96
    return model, (picture(3, size, size),)


def from_timm(name: str) -> Any:
    """A network of timm."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **CHANGED.get(name, {}))
    whole = model.default_cfg.get("fixed_input_size", False) or name in WHOLE_TIMM
    return model, (picture(*model.default_cfg["input_size"]) if whole else picture(3, 96, 96),)


def further_decoders() -> dict[str, str]:
    """Causal language models of transformers that `language.DECODERS` leaves out, by family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

    known = {name if name.endswith("Model") else f"{name}ForCausalLM" for name in language.DECODERS}
    return {name: name for name in sorted(set(ALL.values()) - known) if "ConditionalGeneration" not in name}


def suite(name: str) -> dict[str, Network]:
    """All networks of a suite: `torchvision`, `timm`, `transformers`, `operations`, `decoders` (further ones)."""
    makers: dict[str, Callable[[], Any]]
    if name == "torchvision":
        makers = {n: lambda n=n: from_torchvision(n) for n in TORCHVISION}
    elif name == "timm":
        makers = {n: lambda n=n: from_timm(n) for n in TIMM}
    elif name == "operations":
        makers = {n: lambda n=n: (operations.OPERATIONS[n](), operations.example(n)) for n in operations.OPERATIONS}
    elif name == "decoders":
        makers = {n: lambda n=n: language.decoder(n, language.FURTHER.get(n, {})) for n in further_decoders()}
    else:
        makers = {n: lambda n=n, o=o: language.decoder(n, o) for n, o in language.DECODERS.items()} | language.OTHERS
    return {f"{name}/{key}": Network(f"{name}/{key}", make) for key, make in makers.items()}


SUITES = ("torchvision", "timm", "transformers", "operations")
