"""Checks the job of `train/launch/jobset.yaml` against the schema of Kubernetes, which has none of JobSet."""

from pathlib import Path

import kubernetes_validate
import yaml

KUBERNETES = "1.33"
SPEC = {"replicatedJobs", "failurePolicy"}

jobset = yaml.safe_load(Path("train/launch/jobset.yaml").read_text(encoding="utf-8"))
assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
assert jobset["spec"].keys() == SPEC
for each in jobset["spec"]["replicatedJobs"]:
    assert each.keys() == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": each["name"]}, **each["template"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
