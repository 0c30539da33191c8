"""Domain parallelism on models that nobody here wrote: libraries from PyPI, converted as they are.

Every case builds a small, randomly initialised model of one library and proves on gloo ranks of this machine
that the converted model gives the numbers of the plain one: outputs, and the gradients of inputs and parameters.
No weights are downloaded. A library that is not installed is named and passed over.
"""

from __future__ import annotations

import argparse
import contextlib
import copyreg
import importlib
import importlib.metadata
import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from itertools import chain, groupby
from multiprocessing.connection import Connection, wait
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

EXAMPLES = """\
examples:
  python benchmarks/third_party.py                                  every case on 2 and on 3 ranks
  python benchmarks/third_party.py --write docs/third_party.md      the same, and the table
  python benchmarks/third_party.py --ranks 2 --only swin --only "timm ViT"
  python benchmarks/third_party.py --plain                          the plain models alone: do they run, how long

The libraries, beside a CPU build of torch; torch-harmonics is compiled against it, of the version neuraloperator takes:
  pip install -c constraints.txt -e . torchvision {libraries}
  pip install --no-build-isolation --no-binary torch-harmonics --no-deps torch-harmonics==0.7.4
Other versions of it, and what takes them, in folders of their own below DIR:
  pip install --no-deps --target DIR/harmonics torch-harmonics==0.9.3
  pip install --no-build-isolation --no-binary torch-harmonics --no-deps --target DIR/ace \\
    torch-harmonics==0.8.0 fme dacite
"""

Output = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """A third-party model, tiny, and what it takes.

    Attributes:
        library: the distribution on PyPI that the model comes from.
        model: its name here.
        build: makes the model; imports the library.
        shapes: of the positional inputs, fields of (..., latitude, longitude), drawn from a normal distribution.
        kwargs: keyword inputs; a torch.Size stands for a tensor of that shape.
        output: picks the tensors out of what the model returns.
        dtype: of parameters and inputs; float32 only where the library insists on it.
        tolerance: on the relative error, max |a - b| / max |b|.
        apart: the folder below --apart that the library is in, beside another version of what it takes.
    """

    library: str
    model: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Output | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    apart: str | None = None

    @property
    def name(self) -> str:
        return f"{self.library} {self.model}"

    def folder(self, apart: Path | None) -> str | None:
        """Where the library is, if not among those that are installed."""
        return self.apart and str((apart or Path()).resolve() / self.apart)

    def version(self, apart: Path | None) -> str | None:
        """Of the library; None if it is not installed."""
        folder = self.folder(apart)
        where = {} if folder is None else {"path": [folder]}
        return next((found.version for found in importlib.metadata.distributions(name=self.library, **where)), None)

    def make(self) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
        """The model, its inputs and its keyword inputs: the same on every rank."""
        declare_torchvision_operators()
        copyreg.pickle(torch.library.CustomOpDef, attrgetter("_name"))  # copies of a model share its operators
        torch.manual_seed(0)
        model = self.build()
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_complex():  # Module.double() passes over these, Module.to(float64) drops their imaginary part
                tensor.data = tensor.data.to(self.dtype.to_complex())
            elif tensor.is_floating_point():
                tensor.data = tensor.data.to(self.dtype)
        randomise_constants(model)
        inputs = tuple(torch.randn(shape, dtype=self.dtype) for shape in self.shapes)
        kwargs = {
            name: torch.randn(value, dtype=self.dtype) if isinstance(value, torch.Size) else value
            for name, value in self.kwargs.items()
        }
        return (model if self.output is None else Picked(model, self.output)), inputs, kwargs


class Picked(nn.Module):
    """A model that returns tensors, made of one that returns a dict or a dataclass."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output(self.model(*args, **kwargs))


@cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported beside a CPU build of torch.

    PyPI's torchvision is compiled against CUDA. Where its library does not load, the import fails for want of two
    schemas (box suppression, which no model here calls).
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


@torch.no_grad()
def randomise_constants(model: nn.Module) -> None:
    """Add noise to every parameter whose values are all the same.

    Zeroed last layers and layer scales of 1e-6 would hide whatever goes wrong before them.
    """
    for parameter in model.parameters():
        if parameter.numel() and (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.1 * torch.randn_like(parameter))


def new(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A builder that calls "module:name" with these arguments."""

    def build() -> nn.Module:
        module, name = path.split(":")
        return getattr(importlib.import_module(module), name)(*args, **options)

    return build


timm = partial(new, "timm:create_model", pretrained=False)


def smp(kind: str, encoder: str = "tu-resnet10t", **options: Any) -> Callable[[], nn.Module]:
    """A model of segmentation-models-pytorch; the encoder is timm's ResNet with few channels if none is named."""
    if encoder == "tu-resnet10t":
        options["channels"] = (8, 16, 24, 32)
    return new(f"segmentation_models_pytorch:{kind}", encoder_name=encoder, encoder_weights=None, classes=2, **options)


def transformers(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of Hugging Face transformers, from a configuration and no weights."""

    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, kind)(getattr(library, config)(**options))

    return build


def torchvision_swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[7, 7],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def aurora(height: int, width: int) -> nn.Module:
    """Microsoft's Aurora behind an interface of tensors: it takes and returns batches of named variables."""
    from aurora import Aurora, Batch, Metadata

    class AuroraOnTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aurora = Aurora(
                surf_vars=("2t",),
                static_vars=("lsm",),
                atmos_vars=("t", "q"),
                window_size=(2, 3, 4),
                encoder_depths=(1, 1),
                encoder_num_heads=(1, 2),
                decoder_depths=(1, 1),
                decoder_num_heads=(2, 1),
                patch_size=2,
                embed_dim=16,
                num_heads=2,
                latent_levels=2,
                use_lora=False,
            )
            self.register_buffer("latitudes", torch.linspace(90, -90, height))
            self.register_buffer("longitudes", torch.linspace(0, 360, width + 1)[:-1])

        def forward(self, surface: Tensor, static: Tensor, air: Tensor) -> tuple[Tensor, ...]:
            metadata = Metadata(self.latitudes, self.longitudes, (datetime(2020, 6, 1, 12),), (500, 850))
            variables = {"t": air[:, :, 0], "q": air[:, :, 1]}
            out = self.aurora(Batch({"2t": surface}, {"lsm": static[0, 0]}, variables, metadata))
            return out.surf_vars["2t"], out.atmos_vars["t"], out.atmos_vars["q"]

    return AuroraOnTensors()


def spherical_transforms(kind: str, height: int, width: int) -> nn.Module:
    """To spherical harmonics and back, scaled by degree in between; `kind` is "" or "Vector"."""
    harmonics = importlib.import_module("torch_harmonics")

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.there = getattr(harmonics, f"Real{kind}SHT")(height, width)
            self.back = getattr(harmonics, f"InverseReal{kind}SHT")(height, width)
            self.weight = nn.Parameter(torch.randn(self.there.lmax, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.there(x) * self.weight)

    return Filter()


def ace(height: int, width: int, noise: int, **options: Any) -> nn.Module:
    """The noise-conditioned SFNO of Ai2's climate emulator ACE behind an interface of tensors."""
    from fme.core.distributed import Distributed
    from fme.core.models.conditional_sfno.layers import Context, ContextConfig
    from fme.core.models.conditional_sfno.sfnonet import SFNONetConfig, get_lat_lon_sfnonet

    class AceOnTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            context = ContextConfig(embed_dim_scalar=0, embed_dim_labels=0, embed_dim_noise=noise, embed_dim_pos=0)
            config = SFNONetConfig(embed_dim=12, num_layers=2, **options)
            with Distributed.context():
                self.net = get_lat_lon_sfnonet(config, 3, 2, (height, width), context_config=context)

        def forward(self, x: Tensor, noise: Tensor) -> Tensor:
            return self.net(x, Context(embedding_scalar=None, labels=None, noise=noise, embedding_pos=None))

    return AceOnTensors()


def on_grid(kind: str, height: int, width: int, **options: Any) -> nn.Module:
    """Two graph convolutions of torch_geometric between neighbouring points of a global grid."""
    convolution = getattr(importlib.import_module("torch_geometric.nn"), kind)
    points = torch.arange(height * width).view(height, width)
    east, south, diagonal = points.roll(-1, 1), points[1:], points[1:].roll(-1, 1)
    pairs = [(points, east), (points[:-1], south), (points[:-1], diagonal)]
    one_way = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in pairs], 1)

    class OnGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = convolution(3, 8, **options)
            self.second = convolution(8, 2, **options)
            self.register_buffer("edges", torch.cat([one_way, one_way.flip(0)], 1))

        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            nodes = x.permute(0, 2, 3, 1).flatten(0, 2)
            edges = torch.cat([self.edges + i * height * width for i in range(batch)], 1)
            nodes = self.second(self.first(nodes, edges).relu(), edges)
            return nodes.view(batch, height, width, -1).permute(0, 3, 1, 2)

    return OnGrid()


STAGES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
WINDOWS = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}
PYRAMID = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 4)}
TOKENS = {"embed_dim": 24, "depth": 2, "num_heads": 2}
HUGGING = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
PLANE = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
MODES = {"n_modes": (12, 12), "in_channels": 3, "out_channels": 2, "hidden_channels": 12, "n_layers": 2}
SPHERE = {"img_size": (45, 88), "in_chans": 3, "out_chans": 2, "embed_dim": 12, "num_layers": 2, "scale_factor": 2}
SPHERE_STAGES = {
    "img_size": (48, 96),
    "in_chans": 3,
    "out_chans": 2,
    "embed_dims": [8, 16],
    "depths": [1, 1],
    "scale_factor": 2,
}
HARMONICS = {"apart": "harmonics"}
SINGLE = {"dtype": torch.float32, "tolerance": 1e-4}

# One entry a model, wrapped by hand.
# fmt: off
CASES = (
    Case("timm", "ConvNeXt", timm("convnext_atto", **STAGES, features_only=True), ((2, 3, 104, 136),)),
    Case("timm", "ConvNeXt, drop path", timm("convnext_atto", **STAGES, drop_path_rate=0.3), ((2, 3, 72, 96),)),
    Case("timm", "ResNet", timm("resnet26", channels=(8, 16, 16, 24), num_classes=5), ((2, 3, 104, 136),)),
    Case("timm", "DenseNet", timm("densenet121", block_config=(2, 2, 1), growth_rate=8), ((2, 3, 72, 96),)),
    Case("timm", "HRNet", timm("hrnet_w18_small", num_classes=5), ((2, 3, 64, 96),)),
    Case("timm", "MobileNetV3", timm("mobilenetv3_small_050", num_classes=5), ((2, 3, 104, 136),)),
    Case("timm", "MobileNetV3, same padding", timm("tf_mobilenetv3_small_minimal_100"), ((2, 3, 75, 101),)),
    Case("timm", "ViT", timm("vit_tiny_patch16_224", img_size=(44, 64), patch_size=4, **TOKENS), ((2, 3, 44, 64),)),
    Case("timm", "EVA-02", timm("eva02_tiny_patch14_224", img_size=(56, 84), **TOKENS), ((2, 3, 56, 84),)),
    Case("timm", "Swin",
         timm("swin_tiny_patch4_window7_224", img_size=(44, 72), window_size=4, **WINDOWS, features_only=True),
         ((2, 3, 44, 72),)),
    Case("timm", "Swin v2",
         timm("swinv2_tiny_window8_256", img_size=(56, 72), window_size=7, **WINDOWS, features_only=True),
         ((2, 3, 56, 72),)),
    Case("timm", "MaxViT",
         timm("maxvit_rmlp_pico_rw_256", img_size=(64, 96), embed_dim=(32, 32), depths=(1, 1), stem_width=8),
         ((2, 3, 64, 96),)),
    Case("timm", "CoAtNet",
         timm("coatnet_nano_rw_224", img_size=(64, 96), embed_dim=(32,) * 4, depths=(1,) * 4, stem_width=(8, 8)),
         ((2, 3, 64, 96),)),
    Case("timm", "PVT v2", timm("pvt_v2_b0", **PYRAMID, features_only=True), ((2, 3, 104, 136),)),
    Case("timm", "Twins-SVT", timm("twins_svt_small", img_size=(96, 128), **PYRAMID), ((2, 3, 96, 128),)),
    Case("timm", "MobileViT", timm("mobilevit_xxs", num_classes=5), ((2, 3, 64, 96),)),
    Case("timm", "EdgeNeXt", timm("edgenext_xx_small", depths=(1, 2, 2, 2), dims=STAGES["dims"]), ((2, 3, 104, 136),)),
    Case("timm", "XCiT", timm("xcit_nano_12_p8_224", img_size=(72, 96), **TOKENS), ((2, 3, 72, 96),)),
    Case("timm", "MLP-Mixer",
         new("timm.models.mlp_mixer:MlpMixer", img_size=(44, 64), patch_size=4, embed_dim=16, num_blocks=2),
         ((2, 3, 44, 64),)),
    Case("torchvision", "DeepLabV3",
         new("torchvision.models.segmentation:deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=3),
         ((2, 3, 72, 96),), output=itemgetter("out")),
    Case("torchvision", "ShuffleNetV2", new("torchvision.models:shufflenet_v2_x0_5"), ((2, 3, 104, 136),)),
    Case("torchvision", "Swin v2", torchvision_swin_v2, ((2, 3, 52, 72),)),
    Case("segmentation-models-pytorch", "U-Net", smp("Unet", decoder_channels=(32, 24, 16, 8, 8)), ((2, 3, 96, 128),)),
    Case("segmentation-models-pytorch", "MA-Net", smp("MAnet", decoder_channels=(32, 24) + (16,) * 3),
         ((2, 3, 96, 128),)),
    Case("segmentation-models-pytorch", "FPN",
         smp("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32), ((2, 3, 96, 128),)),
    Case("segmentation-models-pytorch", "PAN", smp("PAN", decoder_channels=16), ((2, 3, 128, 160),)),
    Case("segmentation-models-pytorch", "DeepLabV3+", smp("DeepLabV3Plus", decoder_channels=16), ((2, 3, 96, 128),)),
    Case("segmentation-models-pytorch", "UPerNet", smp("UPerNet", decoder_channels=32), ((2, 3, 96, 128),)),
    Case("segmentation-models-pytorch", "SegFormer", smp("Segformer", "mit_b0", decoder_segmentation_channels=32),
         ((2, 3, 96, 128),)),
    Case("transformers", "SegFormer",
         transformers("SegformerForSemanticSegmentation", "SegformerConfig", **HUGGING, decoder_hidden_size=16,
                      num_attention_heads=[1, 2, 2, 4], drop_path_rate=0.0, classifier_dropout_prob=0.0),
         ((2, 3, 104, 136),), output=attrgetter("logits")),
    Case("transformers", "ConvNeXt v2", transformers("ConvNextV2Model", "ConvNextV2Config", **HUGGING),
         ((2, 3, 104, 136),), output=attrgetter("last_hidden_state")),
    Case("transformers", "PoolFormer", transformers("PoolFormerModel", "PoolFormerConfig", **HUGGING),
         ((2, 3, 104, 136),), output=attrgetter("last_hidden_state")),
    Case("transformers", "Swin2SR",
         transformers("Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=48, embed_dim=12, depths=[2],
                      num_heads=[2], window_size=4, drop_path_rate=0.0),
         ((1, 3, 44, 64),), output=attrgetter("reconstruction")),
    Case("transformers", "DPT",
         transformers("DPTForSemanticSegmentation", "DPTConfig", image_size=96, patch_size=16, hidden_size=24,
                      num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, is_hybrid=False,
                      backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
                      semantic_classifier_dropout=0.0),
         ((2, 3, 96, 96),), output=attrgetter("logits")),
    Case("diffusers", "UNet2DModel",
         new("diffusers:UNet2DModel", **BLOCKS, attention_head_dim=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
         ((2, 3, 44, 64),), {"timestep": 10}, attrgetter("sample")),
    Case("diffusers", "UNet2DConditionModel",
         new("diffusers:UNet2DConditionModel", **BLOCKS, attention_head_dim=2, cross_attention_dim=12,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
         ((2, 4, 44, 64),), {"timestep": 10, "encoder_hidden_states": torch.Size((2, 5, 12))}, attrgetter("sample")),
    Case("diffusers", "AutoencoderKL",
         new("diffusers:AutoencoderKL", **BLOCKS, down_block_types=("DownEncoderBlock2D",) * 2,
             up_block_types=("UpDecoderBlock2D",) * 2),
         ((2, 3, 44, 64),), output=attrgetter("sample")),
    Case("diffusers", "AutoencoderDC",
         new("diffusers:AutoencoderDC", latent_channels=8, attention_head_dim=8, decoder_norm_types="rms_norm",
             **{f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")},
             **{f"{side}_block_out_channels": (16, 16) for side in ("encoder", "decoder")},
             **{f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")},
             **{f"{side}_qkv_multiscales": ((), (5,)) for side in ("encoder", "decoder")}),
         ((1, 3, 52, 64),), output=attrgetter("sample"), tolerance=1e-4),
    Case("denoising-diffusion-pytorch", "Unet",
         new("denoising_diffusion_pytorch:Unet", dim=8, dim_mults=(1, 2, 4), attn_dim_head=8, attn_heads=2),
         ((2, 3, 44, 64),), {"time": torch.Size((2,))}),
    Case("monai", "UNet",
         new("monai.networks.nets:UNet", **PLANE, channels=(8, 16, 24), strides=(2, 2), num_res_units=2),
         ((2, 3, 44, 64),)),
    Case("monai", "UNet, 3-D",
         new("monai.networks.nets:UNet", 3, 3, 2, channels=(8, 16), strides=(2,), norm="batch"), ((2, 3, 4, 44, 64),)),
    Case("monai", "AttentionUnet",
         new("monai.networks.nets:AttentionUnet", **PLANE, channels=(8, 16, 24), strides=(2, 2)), ((2, 3, 44, 64),)),
    Case("monai", "SegResNet",
         new("monai.networks.nets:SegResNet", **PLANE, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
         ((2, 3, 44, 64),)),
    Case("monai", "DynUNet",
         new("monai.networks.nets:DynUNet", **PLANE, kernel_size=(3, 3, 3), strides=(1, 2, 2),
             upsample_kernel_size=(2, 2), filters=(8, 16, 24)),
         ((2, 3, 44, 64),)),
    Case("monai", "UNETR",
         new("monai.networks.nets:UNETR", **PLANE, img_size=(80, 64), feature_size=8, hidden_size=24, mlp_dim=48,
             num_heads=2),
         ((2, 3, 80, 64),)),
    Case("monai", "SwinUNETR",
         new("monai.networks.nets:SwinUNETR", **PLANE, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4),
             window_size=4),
         ((2, 3, 96, 64),)),
    # Their spectral convolutions put the modes into a complex64 buffer, whatever the type of the field.
    Case("neuraloperator", "FNO", new("neuralop.models:FNO", **MODES), ((2, 3, 44, 64),), tolerance=1e-5),
    Case("neuraloperator", "TFNO, padded",
         new("neuralop.models:TFNO", **MODES, rank=0.4, norm="instance_norm", domain_padding=0.1), ((2, 3, 44, 64),),
         tolerance=1e-5),
    Case("neuraloperator", "U-NO",
         new("neuralop.models:UNO", 3, 2, 12, lifting_channels=16, projection_channels=16, n_layers=3,
             uno_out_channels=[12] * 3, uno_n_modes=[[8, 8], [6, 6], [8, 8]], channel_mlp_skip="linear",
             uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]]),
         ((2, 3, 44, 64),), tolerance=1e-5),
    Case("neuraloperator", "LocalNO", new("neuralop.models:LocalNO", **MODES, default_in_shape=(44, 64)),
         ((2, 3, 44, 64),), tolerance=1e-5),
    Case("neuraloperator", "SFNO", new("neuralop.models:SFNO", **MODES), ((2, 3, 44, 88),)),
    Case("torch-harmonics", "SFNO", new("torch_harmonics.examples.models:SphericalFourierNeuralOperatorNet", **SPHERE),
         ((2, 3, 45, 88),), dtype=torch.float32, tolerance=1e-4),
    Case("torch-harmonics", "transforms", partial(spherical_transforms, "", 45, 88), ((2, 3, 45, 88),), **HARMONICS),
    Case("torch-harmonics", "vector transforms", partial(spherical_transforms, "Vector", 45, 88),
         ((2, 3, 2, 45, 88),), **HARMONICS),
    Case("torch-harmonics", "DISCO convolution",
         new("torch_harmonics:DiscreteContinuousConvS2", 3, 4, (45, 88), (45, 88), 3), ((2, 3, 45, 88),), **HARMONICS),
    Case("torch-harmonics", "DISCO convolution, transposed",
         new("torch_harmonics:DiscreteContinuousConvTransposeS2", 3, 4, (23, 44), (45, 88), 3), ((2, 3, 23, 44),),
         **HARMONICS),
    Case("torch-harmonics", "attention", new("torch_harmonics:AttentionS2", 4, 2, (23, 44), (23, 44)),
         ((2, 4, 23, 44),), **HARMONICS),
    Case("torch-harmonics", "neighbourhood attention",
         new("torch_harmonics:NeighborhoodAttentionS2", 4, (23, 44), (23, 44)), ((2, 4, 23, 44),),
         **HARMONICS, **SINGLE),
    Case("torch-harmonics", "SFNO of 0.9",
         new("torch_harmonics.examples.models:SphericalFourierNeuralOperator", **SPHERE),
         ((2, 3, 45, 88),), **HARMONICS, **SINGLE),
    Case("torch-harmonics", "LSNO", new("torch_harmonics.examples.models:LocalSphericalNeuralOperator", **SPHERE),
         ((2, 3, 45, 88),), **HARMONICS, **SINGLE),
    Case("torch-harmonics", "spherical transformer",
         new("torch_harmonics.examples.models:SphericalTransformer", **SPHERE), ((2, 3, 45, 88),),
         **HARMONICS, **SINGLE),
    Case("torch-harmonics", "spherical U-Net", new("torch_harmonics.examples.models:SphericalUNet", **SPHERE_STAGES),
         ((2, 3, 48, 96),), **HARMONICS),
    Case("torch-harmonics", "spherical SegFormer",
         new("torch_harmonics.examples.models:SphericalSegformer", heads=[1, 2], **SPHERE_STAGES), ((2, 3, 48, 96),),
         **HARMONICS, **SINGLE),
    Case("fme", "SFNO (ACE)", partial(ace, 18, 36, 4), ((2, 3, 18, 36), (2, 4, 18, 36)), apart="ace", **SINGLE),
    Case("fme", "SFNO (ACE), local blocks",
         partial(ace, 18, 36, 4, local_blocks=[0], filter_residual=True, global_layer_norm=True),
         ((2, 3, 18, 36), (2, 4, 18, 36)), apart="ace", **SINGLE),
    Case("torch-geometric", "GraphConv", partial(on_grid, "GraphConv", 13, 24), ((2, 3, 13, 24),)),
    Case("torch-geometric", "GraphSAGE, max", partial(on_grid, "SAGEConv", 13, 24, aggr="max"), ((2, 3, 13, 24),)),
    Case("torch-geometric", "GCN", partial(on_grid, "GCNConv", 13, 24), ((2, 3, 13, 24),)),
    Case("torch-geometric", "GAT", partial(on_grid, "GATConv", 13, 24, heads=2, concat=False), ((2, 3, 13, 24),)),
    Case("torch-geometric", "graph transformer",
         partial(on_grid, "TransformerConv", 13, 24, heads=2, concat=False), ((2, 3, 13, 24),)),
    Case("nvidia-physicsnemo", "AFNO (FourCastNet)",
         new("physicsnemo.models.afno:AFNO", inp_shape=[44, 64], in_channels=3, out_channels=2, patch_size=[4, 4],
             embed_dim=16, depth=2, num_blocks=4, sparsity_threshold=0.0),
         ((2, 3, 44, 64),), dtype=torch.float32, tolerance=1e-4),
    Case("nvidia-physicsnemo", "Pangu-Weather",
         new("physicsnemo.models.pangu:Pangu", img_size=(45, 96), embed_dim=12, num_heads=(1, 2, 2, 1)),
         ((1, 72, 45, 96),)),
    Case("nvidia-physicsnemo", "FengWu",
         new("physicsnemo.models.fengwu:Fengwu", img_size=(45, 96), pressure_level=3, embed_dim=6, num_heads=(1,) * 4),
         ((1, 19, 45, 96),)),
    Case("nvidia-physicsnemo", "SongUNet (CorrDiff)",
         new("physicsnemo.models.diffusion_unets:SongUNet", img_resolution=[52, 64], in_channels=3, out_channels=2,
             model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[26], dropout=0.0),
         ((2, 3, 52, 64),), {"noise_labels": torch.Size((2,)), "class_labels": None}),
    Case("nvidia-physicsnemo", "Pix2Pix",
         new("physicsnemo.models.pix2pix:Pix2Pix", 3, 2, 2, conv_layer_size=8, n_downsampling=2, n_upsampling=2,
             n_blocks=1),
         ((2, 3, 44, 64),)),
    Case("microsoft-aurora", "Aurora", partial(aurora, 44, 64), ((1, 2, 44, 64), (1, 1, 44, 64), (1, 2, 2, 2, 44, 64)),
         tolerance=1e-6),
    Case("metnet", "MetNet-2",
         new("metnet:MetNet2", forecast_steps=2, input_channels=4, input_size=64, num_input_timesteps=2, sat_channels=4,
             upsampler_channels=16, lstm_channels=8, encoder_channels=8, lead_time_features=8, center_crop_size=16,
             num_context_blocks=1, output_channels=2, use_preprocessor=False, encoder_dilations=(1, 2)),
         ((1, 2, 4, 64, 96),), {"lead_time": 1}),
    Case("spandrel", "SwinIR",
         new("spandrel.architectures.SwinIR:SwinIR", img_size=44, embed_dim=12, depths=[2], num_heads=[2],
             window_size=4, upscale=2, upsampler="pixelshuffledirect", drop_path_rate=0.0),
         ((2, 3, 44, 64),)),
    Case("spandrel", "NAFNet",
         new("spandrel.architectures.NAFNet:NAFNet", width=8, middle_blk_num=1, enc_blk_nums=[1, 1],
             dec_blk_nums=[1, 1]),
         ((2, 3, 44, 64),)),
    Case("vit-pytorch", "ViT, dropout",
         new("vit_pytorch:ViT", image_size=(44, 64), patch_size=4, num_classes=5, dim=24, depth=2, heads=2, mlp_dim=48,
             dropout=0.1),
         ((2, 3, 44, 64),)),
    Case("vit-pytorch", "CvT",
         new("vit_pytorch.cvt:CvT", num_classes=5, s1_emb_dim=8, s2_emb_dim=16, s3_emb_dim=16, s3_depth=1, s1_heads=1,
             s2_heads=1, s3_heads=1),
         ((2, 3, 104, 136),)),
    Case("vit-pytorch", "MaxViT",
         new("vit_pytorch.max_vit:MaxViT", num_classes=5, dim_conv_stem=8, dim=16, dim_head=8, depth=(1, 1),
             window_size=4, mbconv_expansion_rate=2),
         ((2, 3, 64, 96),)),
)
# fmt: on

STATUSES = ("exact", "differs", "refused", "failed")
GRACE_S = 5.0

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.device_mesh"])


@dataclass(frozen=True)
class Outcome:
    """What came of a case: on one rank, or the worst of its ranks.

    Attributes:
        status: one of `STATUSES`.
        error: the largest relative error.
        message: which tensor has that error; or why the model was refused, or how it failed.
        calls: torch functions met, and how often.
        gathered: those among them that were computed on whole fields.
    """

    status: str
    error: float = 0.0
    message: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    gathered: frozenset[str] = frozenset()

    @property
    def ends_world(self) -> bool:
        """Ranks may have parted in the middle of their messages."""
        return self.status in ("refused", "failed")

    def __str__(self) -> str:
        if self.status == "exact":
            return f"exact, {self.error:.0e}"
        if self.status == "differs":
            return f"differs, {self.error:.0e} ({self.message})"
        return f"{self.status}: {self.message}"


class World:
    """Gloo ranks on this machine, given one case after another; started anew after one that did not end well."""

    def __init__(self, size: int, apart: Path | None) -> None:
        self.size = size
        self.apart = apart
        self._path: str | None = None
        self._ranks: dict[Connection, mp.process.BaseProcess] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, case: Case, timeout: float) -> Outcome:
        """The worst outcome of the ranks; a failure if they give none in `timeout` seconds."""
        path = case.folder(self.apart)
        if path != self._path:
            self.close()
        if not self._ranks:
            self._start(path)
        for pipe in self._ranks:
            pipe.send(case.name)
        outcomes: list[Outcome] = []
        waiting = set(self._ranks)
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                waiting.remove(pipe)
                try:
                    outcomes.append(pipe.recv())
                except EOFError:
                    outcomes.append(Outcome("failed", message="a rank died"))
            if any(outcome.ends_world for outcome in outcomes):
                deadline = min(deadline, time.monotonic() + GRACE_S)  # the others may wait for this rank for ever
        if waiting and not any(outcome.ends_world for outcome in outcomes):
            outcomes.append(Outcome("failed", message=f"no answer in {timeout:.0f} s"))
        worst = max(outcomes, key=lambda outcome: (STATUSES.index(outcome.status), outcome.error))
        if worst.ends_world:
            self.close()
        return worst

    def close(self) -> None:
        """End the ranks."""
        for process in self._ranks.values():
            process.kill()
            process.join()
        self._ranks = {}
        if self._folder:
            self._folder.cleanup()

    def _start(self, path: str | None) -> None:
        self._path = path
        self._folder = tempfile.TemporaryDirectory(prefix="credit-third-party-")
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=serve, args=(rank, self.size, f"{self._folder.name}/store", theirs, path), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks[ours] = process


def serve(rank: int, size: int, store: str, pipe: Connection, path: str | None) -> None:
    """Join the group as `rank`, and answer the name of a case with its outcome until the pipe is closed."""
    look_first_in(path)
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    cases = {case.name: case for case in CASES}
    with quiet(), contextlib.suppress(EOFError):
        while True:
            case = cases[pipe.recv()]
            try:
                pipe.send(verify(case))
            except Exception as error:
                pipe.send(Outcome("failed", message=f"{type(error).__name__}: {error}"))


def look_first_in(path: str | None) -> None:
    """Let this process import from `path` what is there."""
    if path is not None:
        sys.path.insert(0, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No downloads, and none of what libraries print and warn about when their models are built."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


@cache
def domain_manager() -> Any:
    """The manager of a world whose ranks all share one field."""
    from credit.domain_parallel import initialize_domain_parallel

    return initialize_domain_parallel(dist.get_world_size(), dist.get_world_size())


def verify(case: Case) -> Outcome:
    """Prove the case on this rank, together with the others."""
    from credit.domain_parallel import DomainParallelError, verify_parity
    from credit.domain_parallel.partition import PartitionError

    model, inputs, kwargs = case.make()
    try:
        report = verify_parity(
            model, inputs, domain_manager(), kwargs=kwargs, tolerance=case.tolerance, dtype=case.dtype
        )
    except (DomainParallelError, PartitionError) as error:
        return Outcome("refused", message=str(error))
    worst = max(report.errors, key=report.errors.__getitem__)
    where = worst if report.first is None else f"{worst}; first at {report.first}"
    gathered = frozenset(call for call in report.calls if any(f": {call} has no" in text for text in report.gathered))
    return Outcome("exact" if report.exact else "differs", report.errors[worst], where, report.calls, gathered)


def plain(name: str, path: str | None) -> str:
    """What the plain model does: forward and backward, in training and in evaluation mode."""
    torch.set_num_threads(1)
    look_first_in(path)
    case = next(case for case in CASES if case.name == name)
    with quiet():
        model, inputs, kwargs = case.make()
        seconds = []
        for train in (True, False):
            model.train(train)
            start = time.perf_counter()
            result = model(*(tensor.requires_grad_() for tensor in inputs), **kwargs)
            outputs = [result] if isinstance(result, Tensor) else list(result)
            torch.stack([output.square().mean() for output in outputs]).sum().backward()
            seconds.append(time.perf_counter() - start)
            if not all(output.isfinite().all() and output.any() for output in outputs):
                raise ValueError(f"{case.name}: the plain model's outputs are not finite, or all zero")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = shapes(*(output.shape for output in outputs))
    return (
        f"{shapes(*case.shapes)} -> {made}, {parameters / 1e6:.2f} M parameters, "
        f"{seconds[0]:.2f} s training, {seconds[1]:.2f} s evaluation"
    )


def shapes(*of: tuple[int, ...]) -> str:
    """Shapes for a reader: 2x3x44x64."""
    return ", ".join("x".join(str(size) for size in shape) for shape in of)


def page(cases: list[Case], outcomes: dict[tuple[str, int], Outcome], apart: Path | None) -> str:
    """The table in Markdown."""
    ranks = sorted({size for _, size in outcomes})
    rows = [
        ["Library", "Model", "Input", "Operators", "Gathered", *(f"{size} ranks" for size in ranks)],
        ["---"] * (5 + len(ranks)),
    ]
    met: Counter[str] = Counter()
    gathered: Counter[str] = Counter()
    for case in cases:
        of_case = [outcomes[case.name, size] for size in ranks if (case.name, size) in outcomes]
        calls = {name for outcome in of_case for name in outcome.calls}
        whole = {name for outcome in of_case for name in outcome.gathered}
        met.update(calls)
        gathered.update(whole)
        results = [str(outcome) for outcome in of_case] or ["not installed"] * len(ranks)
        library = f"{case.library} {case.version(apart) or ''}".strip()
        counts = [str(len(names) or "") for names in (calls, whole)]
        rows.append([library, case.model, shapes(*case.shapes), *counts, *results])
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows]
    proved = sum(outcome.status == "exact" for outcome in outcomes.values())
    loose = ", ".join(f"{case.name} {case.tolerance:g}" for case in cases if case.tolerance != Case.tolerance)
    return f"""\
# Third-party models

Models from PyPI, converted as they are: no code of theirs is touched, their weights are random, their sizes small.
Each is compared with the plain model on gloo ranks, in float64: outputs, and the gradients of inputs and parameters.
*Exact* gives the largest relative error, max |a - b| / max |b|: within {Case.tolerance:g}, or, where a model
computes in float32 whatever it is given, within what that allows ({loose}).
*Operators* counts the functions that met a field which is cut; *Gathered*, those of them that were computed on whole
fields, on every rank alike, for want of a sharded form. (What comes of one may stay whole, and all that follows.)
{proved} of {len(outcomes)} runs are exact, with torch {torch.__version__}.

Written by `python benchmarks/third_party.py --apart DIR --write docs/third_party.md`; `--help` says what to install.

{chr(10).join(lines)}

## Operators met

With the number of models: {listed(met)}.

## Gathered

{listed(gathered) or "None"}.
"""


def listed(names: Counter[str]) -> str:
    """Names and counts, the most frequent first."""
    return ", ".join(f"`{name}` {count}" for name, count in names.most_common())


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 1 if a model gave other numbers or failed, 0 if all were exact, refused or not installed."""
    others = ("torchvision", "torch-harmonics")
    libraries = " ".join(dict.fromkeys(case.library for case in CASES if case.library not in others and not case.apart))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES.format(libraries=libraries),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks (2 3)")
    parser.add_argument("--only", action="append", metavar="NAME", help="cases whose name contains NAME; repeatable")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds for one case (120)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to FILE, in Markdown")
    parser.add_argument("--plain", action="store_true", help="run the plain models alone, without ranks")
    parser.add_argument(
        "--apart", type=Path, metavar="DIR", help="where libraries are that cannot be installed together"
    )
    options = parser.parse_args(arguments)

    cases = [case for case in CASES if any(part.lower() in case.name.lower() for part in options.only or [""])]
    if not cases:
        parser.error(f"no case is named {' or '.join(options.only)}; known: {', '.join(case.name for case in CASES)}")
    installed = [case for case in cases if case.version(options.apart)]
    for library in dict.fromkeys(case.library for case in cases if case not in installed):
        print(f"{library} is not installed")
    if options.plain:
        for path, some in groupby(installed, lambda case: case.folder(options.apart)):
            with ProcessPoolExecutor(1, _context) as process:
                for case in some:
                    print(f"{case.name}: {process.submit(plain, case.name, path).result()}", flush=True)
        return 0

    outcomes: dict[tuple[str, int], Outcome] = {}
    for size in options.ranks:
        world = World(size, options.apart)
        for case in installed:
            start = time.perf_counter()
            outcomes[case.name, size] = outcome = world.run(case, options.timeout)
            print(f"{case.name}, {size} ranks: {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
        world.close()
    if options.write:
        options.write.write_text(page(cases, outcomes, options.apart))
    return int(any(outcome.status in ("differs", "failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
