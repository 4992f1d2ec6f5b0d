"""Parameter counts of published models, to tell at a glance whether a checkpoint of that shape is all there.

Counts are those of transformers' own classes, built from each repository's `config.json` without weights.
"""

from __future__ import annotations

from flagscale_convert.architecture import Architecture

__all__ = ["Published", "published_like"]

Published = tuple[str, int]
"""Repository and number of parameters."""
_CLIP_NORM = 2048
"""Elements of a norm that LLaVA-1.5's class has and never passes features through."""
_MODELS: dict[tuple[str, int, int, int], Published] = {
    ("llama", 40, 5120, 32000): ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
    ("llama", 80, 8192, 32000): ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
    ("llama", 32, 4096, 32000): ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    ("llama", 80, 8192, 128256): ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
    ("llama", 32, 4096, 128256): ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    ("llama", 126, 16384, 128256): ("meta-llama/Llama-3.1-405B", 405_853_388_800),
    ("llava", 40, 5120, 32064): ("llava-hf/llava-1.5-13b-hf", 13_351_494_656 - _CLIP_NORM),
    ("llava", 32, 4096, 32064): ("llava-hf/llava-1.5-7b-hf", 7_063_427_072 - _CLIP_NORM),
    ("llava_onevision", 24, 896, 152000): ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 893_675_552),
    ("llava_onevision", 80, 8192, 152128): ("llava-hf/llava-onevision-qwen2-72b-ov-hf", 73_181_570_592),
    ("llava_onevision", 28, 3584, 152000): ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8_029_890_080),
    ("mixtral", 56, 6144, 32768): ("mistralai/Mixtral-8x22B-v0.1", 140_630_071_296),
    ("mixtral", 32, 4096, 32000): ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    ("qwen2", 24, 896, 151936): ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ("qwen2", 28, 1536, 151936): ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
    ("qwen2", 48, 5120, 152064): ("Qwen/Qwen2.5-14B", 14_770_033_664),
    ("qwen2", 64, 5120, 152064): ("Qwen/Qwen2.5-32B", 32_763_876_352),
    ("qwen2", 36, 2048, 151936): ("Qwen/Qwen2.5-3B", 3_085_938_688),
    ("qwen2", 80, 8192, 152064): ("Qwen/Qwen2.5-72B", 72_706_203_648),
    ("qwen2", 28, 3584, 152064): ("Qwen/Qwen2.5-7B", 7_615_616_512),
    ("qwen2_5_vl", 64, 5120, 152064): ("Qwen/Qwen2.5-VL-32B-Instruct", 33_452_718_336),
    ("qwen2_5_vl", 36, 2048, 151936): ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
    ("qwen2_5_vl", 80, 8192, 152064): ("Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344),
    ("qwen2_5_vl", 28, 3584, 152064): ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ("qwen3", 28, 1024, 151936): ("Qwen/Qwen3-0.6B", 596_049_920),
    ("qwen3", 28, 2048, 151936): ("Qwen/Qwen3-1.7B", 1_720_574_976),
    ("qwen3", 40, 5120, 151936): ("Qwen/Qwen3-14B", 14_768_307_200),
    ("qwen3_moe", 94, 4096, 151936): ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
    ("qwen3_moe", 48, 2048, 151936): ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ("qwen3", 64, 5120, 151936): ("Qwen/Qwen3-32B", 32_762_123_264),
    ("qwen3", 36, 2560, 151936): ("Qwen/Qwen3-4B", 4_022_468_096),
    ("qwen3", 36, 4096, 151936): ("Qwen/Qwen3-8B", 8_190_735_360),
    ("qwen3_omni_thinker", 48, 2048, 152064): (
        "the thinker of Qwen/Qwen3-Omni-30B-A3B-Instruct",
        31_719_205_488,
    ),
    ("qwen3_vl", 64, 5120, 151936): ("Qwen/Qwen3-VL-32B-Instruct", 33_357_390_064),
    ("qwen3_vl", 36, 2560, 151936): ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
    ("qwen3_vl", 36, 4096, 151936): ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    ("rwkv7", 12, 768, 65536): ("fla-hub/rwkv7-191M-world", 191_034_624),
    ("rwkv7", 24, 1024, 65536): ("fla-hub/rwkv7-0.4B-world", 450_767_872),
    ("rwkv7", 24, 2048, 65536): ("fla-hub/rwkv7-1.5B-world", 1_527_404_544),
    ("rwkv7", 32, 2560, 65536): ("fla-hub/rwkv7-2.9B-world", 2_947_735_040),
    ("rwkv7", 32, 4096, 65536): ("fla-hub/rwkv7-7.2B-g0", 7_199_141_888),
}
"""By family, layers, hidden size and vocabulary."""


def published_like(arch: Architecture) -> Published | None:
    """Find the published model of the same family, depth, width and vocabulary, if there is one."""
    return _MODELS.get((arch.family, arch.num_layers, arch.hidden_size, arch.vocab_size))
