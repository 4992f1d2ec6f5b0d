"""One FlagOS profile for all plug-ins, and refusals that name both sides."""

from __future__ import annotations

import pytest

from flagscale_hw import CHIPS, FlagOSProfile, InputError, flagos_env
from flagscale_hw.flagos import KINDS

PREFIXES = ("TE_FL", "VLLM_FL", "SGLANG_FL")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_wish_is_the_same_everywhere(chip, kind):
    made = flagos_env(FlagOSProfile(prefer=kind, strict=True), chip)
    assert {made[f"{prefix}_PREFER"] for prefix in PREFIXES} == {kind}
    assert {made[f"{prefix}_STRICT"] for prefix in PREFIXES} == {"1"}
    assert made["USE_FLAGGEMS"] == ("1" if kind == "flagos" else "0")
    assert list(made) == sorted(made)


def test_each_plug_in_gets_its_own_name_of_a_vendor():
    made = flagos_env(
        FlagOSProfile(
            allow=("ascend", "enflame"),
            deny=("nvidia", "mthreads"),
            per_op={"rms_norm": ("vendor:ascend", "flagos"), "silu": ("reference",)},
        ),
        "ascend",
    )
    assert made["TE_FL_ALLOW_VENDORS"] == "npu,enflame"
    assert made["VLLM_FL_ALLOW_VENDORS"] == "ascend,gcu"
    assert made["SGLANG_FL_ALLOW_VENDORS"] == "ascend,enflame"
    assert made["TE_FL_DENY_VENDORS"] == "cuda,musa"
    assert made["TE_FL_PER_OP"] == "rms_norm=vendor:npu|flagos;silu=reference"
    assert (
        made["VLLM_FL_PER_OP"] == made["SGLANG_FL_PER_OP"] == "rms_norm=vendor:ascend|flagos;silu=reference"
    )
    assert made["MG_FL_PREFER"] == "npu"


def test_the_chips_own_defaults():
    assert flagos_env(FlagOSProfile(), "metax")["TE_FL_PREFER"] == "flagos"
    thead = flagos_env(FlagOSProfile(), "thead")
    assert (thead["TE_FL_PREFER"], thead["NVTE_UNFUSED_ATTN"], thead["USE_FLAGGEMS"]) == (
        "reference",
        "1",
        "0",
    )
    assert "TE_FL_SKIP_CUDA" not in flagos_env(FlagOSProfile(), "nvidia")
    assert flagos_env(FlagOSProfile(), "hygon")["TE_FL_SKIP_CUDA"] == "1"
    assert "MG_FL_PREFER" not in flagos_env(FlagOSProfile(), "gaudi")


def test_flagcx_carries_the_collectives():
    made = flagos_env(FlagOSProfile(flagcx="/opt/flagcx"), "mthreads")
    assert (made["FLAGCX_PATH"], made["SGLANG_FL_DIST_BACKEND"]) == ("/opt/flagcx", "flagcx")
    assert flagos_env(FlagOSProfile(), "mthreads")["SGLANG_FL_DIST_BACKEND"] == "mccl"


def test_operators_of_flaggems():
    made = flagos_env(FlagOSProfile(except_ops=("mm", "pad")), "nvidia")
    assert made["VLLM_FL_FLAGOS_BLACKLIST"] == made["SGLANG_FL_FLAGOS_BLACKLIST"] == "mm,pad"
    assert "VLLM_FL_FLAGOS_WHITELIST" not in made


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (FlagOSProfile(prefer="fast"), "prefer: 'fast': not a kind: use one of flagos, vendor, reference"),
        (FlagOSProfile(allow=("tpu",)), "allow: 'tpu': not a chip"),
        (FlagOSProfile(per_op={"a b": ("flagos",)}), "per_op: 'a b': not the name of an operator"),
        (FlagOSProfile(per_op={"mm": ()}), "per_op.mm: nothing given"),
        (FlagOSProfile(per_op={"mm": ("triton",)}), "per_op.mm: 'triton': use flagos, vendor,"),
        (FlagOSProfile(allow=("amd",), deny=("amd",)), "allow: amd, deny: amd: both cannot be"),
        (FlagOSProfile(only_ops=("mm",), except_ops=("pad",)), "only_ops: mm, except_ops: pad: the plug-ins"),
        (FlagOSProfile(flaggems=False, only_ops=("mm",)), "flaggems: false, only_ops: mm"),
        (FlagOSProfile(deny=("amd",), per_op={"mm": ("vendor:amd",)}), "per_op.mm: vendor:amd, deny: amd"),
        (FlagOSProfile(allow=("ascend",), per_op={"mm": ("vendor:amd",)}), "vendor:amd, allow: ascend"),
        (FlagOSProfile(prefer="vendor", deny=("ascend",)), "deny: ascend: ascend is the chip itself"),
        (FlagOSProfile(prefer="vendor", allow=("amd",)), "allow: amd: ascend, the chip itself"),
        (FlagOSProfile(prefer="flagos", strict=True, flaggems=False), "strict: true, flaggems: false"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(profile, said):
    with pytest.raises(InputError) as caught:
        flagos_env(profile, "ascend")
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_contradictions_are_said_at_once():
    profile = FlagOSProfile(allow=("amd",), deny=("amd",), only_ops=("mm",), except_ops=("mm",))
    with pytest.raises(InputError) as caught:
        flagos_env(profile, "ascend")
    assert len(str(caught.value).splitlines()) == 3


def test_flagcx_needs_an_adaptor():
    with pytest.raises(InputError, match="flagcx: /opt/flagcx, chip: gaudi: FlagCX has no adaptor"):
        flagos_env(FlagOSProfile(flagcx="/opt/flagcx"), "gaudi")


def test_the_environment_must_agree():
    profile = FlagOSProfile(prefer="flagos")
    agreeing = {"TE_FL_PREFER": "flagos", "USE_FLAGGEMS": "true", "VLLM_FL_STRICT": "0", "HOME": "/root"}
    assert flagos_env(profile, "ascend", environ=agreeing) == flagos_env(profile, "ascend")
    with pytest.raises(InputError) as caught:
        flagos_env(profile, "ascend", environ={"TE_FL_PREFER": "vendor", "MG_FL_PREFER": "musa"})
    assert str(caught.value).splitlines() == [
        "TE_FL_PREFER: vendor in the environment, flagos by the FlagOS profile: remove one",
        "MG_FL_PREFER: musa in the environment, npu by the FlagOS profile: remove one",
    ]
    with pytest.raises(InputError, match="TE_FL_PREFER_VENDOR: 1 in the environment, TE_FL_PREFER=flagos"):
        flagos_env(profile, "ascend", environ={"TE_FL_PREFER_VENDOR": "1"})
