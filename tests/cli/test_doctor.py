"""`doctor` names what is wrong instead of dying of it."""

from mcore_longctx.launch import doctor


def subjects(findings: list[doctor.Finding], level: str) -> dict[str, str]:
    return {finding.subject: finding.text for finding in findings if finding.level == level}


def test_this_machine_is_fit() -> None:
    findings = doctor.examine()
    assert not subjects(findings, "wrong")
    assert {"python", "torch", "megatron-core", "apex"} <= subjects(findings, "ok").keys()


def test_an_empty_transformer_engine_is_named() -> None:
    text = "RuntimeError: Found empty `transformer-engine` meta package installed."
    found = {"torch": "2", "cuda": None, "gpus": [], "nccl": False, "gloo": True, "megatron_error": text, "te_error": text}
    wrong = subjects(doctor._torch_findings(found, {"torch": "2"}), "wrong")
    assert "pip uninstall transformer-engine" in wrong["megatron-core"]


def test_a_missing_torch_is_named_with_its_cure() -> None:
    wrong = subjects(doctor._torch_findings({"error": "ModuleNotFoundError: No module named 'torch'"}, {}), "wrong")
    assert wrong["torch"] == "ModuleNotFoundError: No module named 'torch'; pip install 'mcore-longctx[train]'"
