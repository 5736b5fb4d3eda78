"""Cluster files against the schemas of those who read them; an unknown key is a mistake nobody would report."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD schema in which unknown keys are refused, as kubectl does not."""
    schema = copy.deepcopy(schema)

    def tighten(node: Any) -> None:
        if isinstance(node, list):
            for part in node:
                tighten(part)
        if not isinstance(node, dict):
            return
        if node.pop("x-kubernetes-int-or-string", False):
            node.pop("type", None)
            node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for part in node.values():
            tighten(part)

    tighten(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return found


@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_kuberay_files_fit_their_schema(kind: str) -> None:
    file = SCHEMAS / f"{kind}s-v1.schema.json"
    if not file.exists():
        pytest.skip(f"{file} is not here; KUBERAY_SCHEMAS names the folder with the schemas of the KubeRay CRDs")
    validator = Draft7Validator(strict(json.loads(file.read_text())))
    document = load(f"kuberay/{kind}.yaml")
    assert [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(document)] == []
    cluster = document["spec"] if kind == "raycluster" else document["spec"]["rayClusterSpec"]
    wrong = copy.deepcopy(document)
    (wrong["spec"] if kind == "raycluster" else wrong["spec"]["rayClusterSpec"])["headGroupSpec"]["replica"] = 1
    assert any("replica" in error.message for error in validator.iter_errors(wrong))
    # rules of the operator that no schema knows
    assert document["metadata"]["name"] == document["metadata"]["name"].lower()
    assert len(document["metadata"]["name"]) < 48
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 60
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert all(container["envFrom"] == [{"secretRef": {"name": "object-store"}}] for container in containers)


def test_both_kuberay_files_describe_the_same_cluster() -> None:
    assert load("kuberay/raycluster.yaml")["spec"] == load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    job = load("kuberay/rayjob.yaml")["spec"]
    workers = job["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert f"--workers {workers} " in job["entrypoint"]
    assert job["shutdownAfterJobFinishes"]


@pytest.mark.parametrize("name", ["aws", "on-premises"])
def test_ray_up_files_are_valid_as_ray_fills_them_in(name: str) -> None:
    validate_config(prepare_config(load(f"ray-up/{name}.yaml")))


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
def test_ray_up_files_fit_the_schema_of_ray(name: str) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    errors = [error.message for error in Draft7Validator(schema).iter_errors(load(f"ray-up/{name}.yaml"))]
    assert errors == []


def test_slurm_script_passes_its_arguments_on(tmp_path: Path) -> None:
    """Run with stand-ins for the commands of Slurm that print what they are given."""
    script = CLUSTER / "slurm" / "distot.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "srun $@"\n')
    for tool in ("scontrol", "srun"):
        (tmp_path / tool).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    assert shutil.which("bash")
    done = subprocess.run(
        ["bash", str(script), "latents.zarr", "a run.zarr", "--until-chi2", "0.1"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ray symmetric-run --address node1:6379 --min-nodes 2" in done.stdout
    assert "python -m jobs.solve latents.zarr a run.zarr --until-chi2 0.1 --workers 16 --ray auto" in done.stdout
