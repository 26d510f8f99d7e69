"""Checks the Helm chart and renders the plain manifests: see `deploy.rs`.

Arguments: the chart's directory. Standard output: the manifests for the values
that stand for "without Helm". Every set of values below is rendered by Helm's
own engine and validated against the schemas of Kubernetes' releases.
"""

import sys

import helm_python as helm
import kubernetes_validate
import kubernetes_validate.utils
import yaml

NAMESPACE = "interceptor-system"
PLAIN = {"createNamespace": True}
# What else must render, and into what is valid.
OTHERS = [
    {},
    {"uninstall": True},
    {"kubernetes": {"enabled": False}},
    {"kubernetes": {"enabled": True}, "uninstall": True},
    {"cni": {"onError": "pass", "confDir": "/etc/rancher/net.d", "binDir": "/var/lib/cni"}},
    {"daemon": {"metrics": "127.0.0.1:1", "settings": {"outbound_ports": "80"}}},
    {"image": {"repository": "r.example/i", "tag": "t"}, "imagePullSecrets": [{"name": "s"}]},
]
# What must be refused.
WRONG = [
    {"cni": {"onError": "perhaps"}},
    {"uninstal": True},
    {"cni": {"binDir": "opt"}},
    {"daemon": {"metrics": "no"}},
    {"daemon": {"metrics": "127.0.0.1:1", "socket": "/s"}},
    {"daemon": {"metrics": "127.0.0.1:1", "kubernetes": False}},
    {"kubernetes": {"enabled": "perhaps"}},
]
# From the oldest that the chart admits.
RELEASES = kubernetes_validate.utils.all_versions()


def render(chart, values):
    """The documents for the values, as Helm sends them."""
    files = chart.render(values, name="interceptor", namespace=NAMESPACE)
    documents = []
    for name in sorted(files):
        if name.endswith(".yaml"):
            documents += [text.strip() for text in files[name].split("\n---") if text.strip()]
    documents = [text for text in documents if yaml.safe_load(text)]
    # A namespace comes before what is in it, the rest as Helm orders it.
    order = [
        "Namespace",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
    ]
    return sorted(documents, key=lambda text: order.index(yaml.safe_load(text)["kind"]))


def validate(document):
    """Fails if a release of Kubernetes wouldn't take it."""
    for release in RELEASES:
        kubernetes_validate.validate(yaml.safe_load(document), release, strict=True)


def assert_unprivileged(document):
    """No container is privileged, and all drop every capability first."""
    spec = yaml.safe_load(document)
    if spec["kind"] != "DaemonSet":
        return
    pod = spec["spec"]["template"]["spec"]
    for container in pod["containers"] + pod.get("initContainers", []):
        security = container["securityContext"]
        assert not security.get("privileged"), container["name"]
        assert security["allowPrivilegeEscalation"] is False, container["name"]
        assert security["capabilities"]["drop"] == ["ALL"], container["name"]


def assert_asks_only_if_told(documents, values):
    """Who asks no API server has neither a right nor a token."""
    asks = values.get("kubernetes", {}).get("enabled", True) and not values.get("uninstall")
    kinds = [yaml.safe_load(document)["kind"] for document in documents]
    assert ("ClusterRole" in kinds) == ("ClusterRoleBinding" in kinds) == asks, kinds
    for spec in map(yaml.safe_load, documents):
        if spec["kind"] != "DaemonSet":
            continue
        pod = spec["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert any("projected" in volume for volume in pod["volumes"]) == asks
        with_token = [
            container["name"]
            for container in pod["containers"] + pod.get("initContainers", [])
            if any(mount["name"] == "api" for mount in container.get("volumeMounts", []))
        ]
        assert with_token == (["daemon"] if asks else []), with_token


def main(path):
    for finding in helm.lint(path)["messages"]:
        # Information (1), as on a missing icon, is no defect.
        assert finding["severity"] <= 1, finding
    with helm.Chart.load(path) as chart:
        for values in [PLAIN, *OTHERS]:
            documents = render(chart, values)
            for document in documents:
                validate(document)
                assert_unprivileged(document)
            assert_asks_only_if_told(documents, values)
        for values in WRONG:
            try:
                chart.validate_schema(values)
            except helm.HelmError:
                continue
            raise AssertionError(f"{values} is not refused")
        plain = render(chart, PLAIN)
    sys.stdout.write("# Generated from the Helm chart: `cargo xtask manifests` writes it anew.\n")
    for document in plain:
        sys.stdout.write(f"---\n{document}\n")


main(sys.argv[1])
