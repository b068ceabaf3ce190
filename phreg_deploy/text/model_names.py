"""Which open_clip architecture and tag has the weights of a timm CLIP, SigLIP or Perception Encoder.

Only names whose weights are the same file, by the hub names in timm's and open_clip's own tables or by the towers that
open_clip builds with timm, are listed; a name with two candidates is left out.
"""

from __future__ import annotations

# timm name without tag: (open_clip architecture, {timm tag: open_clip tag}).
_CLIP: dict[str, tuple[str, dict[str, str]]] = {
    "vit_base_patch32_clip_224": (
        "ViT-B-32", {"laion2b": "laion2b_s34b_b79k", "datacompxl": "datacomp_xl_s13b_b90k"}
    ),
    "vit_base_patch32_clip_256": ("ViT-B-32-256", {"datacompxl": "datacomp_s34b_b86k"}),
    "vit_base_patch32_clip_quickgelu_224": (
        "ViT-B-32-quickgelu",
        {
            "openai": "openai", "laion400m_e32": "laion400m_e32", "metaclip_400m": "metaclip_400m",
            "metaclip_2pt5b": "metaclip_fullcc",
        },
    ),
    "vit_base_patch16_clip_224": (
        "ViT-B-16",
        {
            "laion2b": "laion2b_s34b_b88k", "datacompxl": "datacomp_xl_s13b_b90k", "laion400m_e32": "laion400m_e32",
        },
    ),
    "vit_base_patch16_clip_quickgelu_224": (
        "ViT-B-16-quickgelu",
        {
            "openai": "openai", "metaclip_400m": "metaclip_400m", "metaclip_2pt5b": "metaclip_fullcc",
        },
    ),
    "vit_large_patch14_clip_224": (
        "ViT-L-14",
        {
            "laion2b": "laion2b_s32b_b82k", "datacompxl": "datacomp_xl_s13b_b90k", "laion400m_e32": "laion400m_e32",
            "dfn2b_s39b": "dfn2b_s39b",
        },
    ),
    "vit_large_patch14_clip_quickgelu_224": (
        "ViT-L-14-quickgelu",
        {
            "openai": "openai", "dfn2b": "dfn2b", "metaclip_400m": "metaclip_400m", "metaclip_2pt5b": "metaclip_fullcc",
        },
    ),
    "vit_large_patch14_clip_quickgelu_336": ("ViT-L-14-336-quickgelu", {"openai": "openai"}),
    "vit_huge_patch14_clip_224": (
        "ViT-H-14", {"laion2b": "laion2b_s32b_b79k", "metaclip_altogether": "metaclip_altogether"}
    ),
    "vit_huge_patch14_clip_quickgelu_224": (
        "ViT-H-14-quickgelu", {"dfn5b": "dfn5b", "metaclip_2pt5b": "metaclip_fullcc"}
    ),
    "vit_huge_patch14_clip_quickgelu_378": ("ViT-H-14-378-quickgelu", {"dfn5b": "dfn5b"}),
    "vit_gigantic_patch14_clip_224": ("ViT-bigG-14", {"laion2b": "laion2b_s39b_b160k"}),
    "vit_gigantic_patch14_clip_quickgelu_224": ("ViT-bigG-14-quickgelu", {"metaclip_2pt5b": "metaclip_fullcc"}),
    "eva02_base_patch16_clip_224": ("EVA02-B-16", {"merged2b": "merged2b_s8b_b131k"}),
    "eva02_large_patch14_clip_224": ("EVA02-L-14", {"merged2b": "merged2b_s4b_b131k"}),
    "eva02_large_patch14_clip_336": ("EVA02-L-14-336", {"merged2b": "merged2b_s6b_b61k"}),
    "vit_pe_core_tiny_patch16_384": ("PE-Core-T-16-384", {"fb": "meta"}),
    "vit_pe_core_small_patch16_384": ("PE-Core-S-16-384", {"fb": "meta"}),
    "vit_pe_core_base_patch16_224": ("PE-Core-B-16", {"fb": "meta"}),
    "vit_pe_core_large_patch14_336": ("PE-Core-L-14-336", {"fb": "meta"}),
    "vit_pe_core_gigantic_patch14_448": ("PE-Core-bigG-14-448", {"fb": "meta"}),
}  # fmt: skip
# timm name without "vit_": open_clip's names by timm's tag; the tag of all is "webli".
_SIGLIP: dict[str, dict[str, str]] = {
    "base_patch16_siglip_224": {"webli": "ViT-B-16-SigLIP", "v2_webli": "ViT-B-16-SigLIP2"},
    "base_patch16_siglip_256": {
        "webli": "ViT-B-16-SigLIP-256", "v2_webli": "ViT-B-16-SigLIP2-256", "webli_i18n": "ViT-B-16-SigLIP-i18n-256",
    },
    "base_patch16_siglip_384": {"webli": "ViT-B-16-SigLIP-384", "v2_webli": "ViT-B-16-SigLIP2-384"},
    "base_patch16_siglip_512": {"webli": "ViT-B-16-SigLIP-512", "v2_webli": "ViT-B-16-SigLIP2-512"},
    "base_patch32_siglip_256": {"v2_webli": "ViT-B-32-SigLIP2-256"},
    "large_patch16_siglip_256": {"webli": "ViT-L-16-SigLIP-256", "v2_webli": "ViT-L-16-SigLIP2-256"},
    "large_patch16_siglip_384": {"webli": "ViT-L-16-SigLIP-384", "v2_webli": "ViT-L-16-SigLIP2-384"},
    "large_patch16_siglip_512": {"v2_webli": "ViT-L-16-SigLIP2-512"},
    "so400m_patch14_siglip_224": {"webli": "ViT-SO400M-14-SigLIP", "v2_webli": "ViT-SO400M-14-SigLIP2"},
    "so400m_patch14_siglip_378": {"webli": "ViT-SO400M-14-SigLIP-378", "v2_webli": "ViT-SO400M-14-SigLIP2-378"},
    "so400m_patch14_siglip_384": {"webli": "ViT-SO400M-14-SigLIP-384"},
    "so400m_patch16_siglip_256": {
        "v2_webli": "ViT-SO400M-16-SigLIP2-256", "webli_i18n": "ViT-SO400M-16-SigLIP-i18n-256",
    },
    "so400m_patch16_siglip_384": {"v2_webli": "ViT-SO400M-16-SigLIP2-384"},
    "so400m_patch16_siglip_512": {"v2_webli": "ViT-SO400M-16-SigLIP2-512"},
    "giantopt_patch16_siglip_256": {"v2_webli": "ViT-gopt-16-SigLIP2-256"},
    "giantopt_patch16_siglip_384": {"v2_webli": "ViT-gopt-16-SigLIP2-384"},
}  # fmt: skip

# timm name with tag: (open_clip architecture, open_clip tag).
OPEN_CLIP: dict[str, tuple[str, str]] = {
    f"{name}.{tag}": (architecture, theirs)
    for name, (architecture, tags) in _CLIP.items()
    for tag, theirs in tags.items()
} | {
    f"vit_{name}.{tag}": (architecture, "webli")
    for name, architectures in _SIGLIP.items()
    for tag, architecture in architectures.items()
}


def vision_names(architecture: str, tag: str | None) -> tuple[str, ...]:
    """Return the timm names of an open_clip model's image tower; without tag if the weights are a file's.

    A timm name without "quickgelu" is listed too: timm publishes those weights under both names.
    """
    if tag is None:
        names = {name.partition(".")[0] for name, (own, _) in OPEN_CLIP.items() if own == architecture}
    else:
        names = {name for name, pair in OPEN_CLIP.items() if pair == (architecture, tag)}
    return tuple(sorted(names | {name.replace("_quickgelu", "") for name in names}))
