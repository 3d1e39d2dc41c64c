"""Architecture tests: imports, names, unused settings and lock files.

They read syntax trees and text, and import nothing of the project into this process.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hyper_model", "server", "hyper", "training", "loadtests", "tests")
FOLDERS = {"hyper": "client/hyper"}
"""Folders of packages with another name than their folder."""

MAY_IMPORT = {
    "hyper_model": set[str](),
    "server": {"hyper_model"},
    "training": {"hyper_model"},
    "hyper": {"server", "hyper_model"},
    "loadtests": set[str](),
    "tests": {"hyper_model", "server", "hyper", "training", "loadtests"},
}
"""Permitted imports between our packages; loadtests uses HTTP instead."""

VLLM_MODULES = {
    "server.engines.vllm",
    "hyper_model.int8_gain",
    "hyper_model.pause_vllm",
    "hyper_model.drafts_vllm",
    "hyper_model.vllm_plugin",
    "training.rl.rollout",
    "loadtests.peers",
}
"""The only modules with imports of vLLM, because vLLM changes faster than our other dependencies."""

MEASURED_WITHOUT_HTTP = {"loadtests.peers", "loadtests.random_qwen", "loadtests.simulation"}
"""Modules without HTTP: the benchmark's engines and models, the rehearsal's model, and the simulated fleet."""

PURE_MODULES = (
    "hyper_model.errors",
    "hyper_model.trace",
    "hyper_model.pause",
    "hyper_model.drafts",
    "hyper_model.draft_support",
    "hyper_model.answering",
    "training.rl.rewards",
)
"""Modules free of torch, transformers and vLLM, at any depth of imports."""

HEAVY = {"torch", "transformers", "vllm"}

HTTP_LIBRARIES = {"fastapi", "starlette", "uvicorn", "httpx"}

LAYERS: Mapping[str, tuple[str, ...]] = {
    "server": (
        "settings telemetry page",
        "api_keys errors",
        "engines decoding quotas recordings storage jobs",
        "pause_budget quantization request_context quota_store embedded",
        "error_handlers limiter",
        "generation_stats",
        "answering admission gauges",
        "service",
        "middleware connection",
        "api",
        "app",
        "serving",
        "fleet",
        "commands",
    ),
    "training": (
        "text_metrics",
        "recipes",
        "data policy",
        "export",
        "trainer",
        "sft rl run_report",
        "evaluation",
        "ablation",
        "cli",
    ),
}
"""The units of a package (modules and sub-packages), lowest first: each imports only units of lower rows."""

VAGUE_NAMES = re.compile(r"^(utils?|common|helpers?|misc|core|services?_?layer|base_.*|managers?|.*_v\d+|.*_utils)$")
"""Module names without a meaning."""

LOCKS = ("cpu", "gpu", "train", "data", "baseline", "small", "dev", "load", "fleet", "sbom")
BROKEN_BESIDE_CPU_TORCH = {"torchvision", "torchaudio", "torchcodec"}


@cache
def modules() -> dict[str, Path]:
    """Return the path of every module of the five packages by its dotted name; a package means its `__init__`."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        folder = ROOT / FOLDERS.get(package, package)
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imports(module: str, *, at_import_time_only: bool = False) -> set[str]:
    """Return the dotted names imported by a module; a name from a package counts as a possible sub-module.

    With `at_import_time_only`, imports inside functions and under `if TYPE_CHECKING:` are excluded.
    """
    names: set[str] = set()
    for node in statements(tree(module)) if at_import_time_only else ast.walk(tree(module)):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                origin = absolute(node, module)
                names.add(origin)
                names.update(f"{origin}.{alias.name}" for alias in node.names)
            case _:
                pass
    return names


def absolute(node: ast.ImportFrom, module: str) -> str:
    """Return the full name of the module in a `from` import."""
    if not node.level:
        return node.module or ""
    is_package = modules()[module].name == "__init__.py"
    parts = module.split(".")
    parents = parts[: len(parts) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes executed at a module's import."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for other in child.orelse:
                    yield other
                    yield from statements(other)
            case _:
                yield child
                yield from statements(child)


def top(name: str) -> str:
    return name.partition(".")[0]


def mirror_of(module: str) -> str:
    """Return the name of a module's test module."""
    package, _, name = module.rpartition(".")
    return f"tests.{package}.test_{name}"


def unit(module: str) -> str:
    """Return the sub-package of a module, or the module itself directly below its package."""
    return ".".join(module.split(".")[:2])


def unit_arrows(package: str) -> set[tuple[str, str]]:
    """Return the imports between the units of a package, as (importer, imported)."""
    return {
        (unit(module), unit(name))
        for module in modules()
        if top(module) == package
        for name in imports(module)
        if top(name) == package and name in modules() and unit(name) not in (package, unit(module))
    }


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of mutually reachable nodes."""
    reach = {node: _reached(node, graph) for node in graph}
    loops = {frozenset({node, *(other for other in reach[node] if node in reach.get(other, ()))}) for node in graph}
    return [set(loop) for loop in loops if len(loop) > 1]


def _reached(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for other in graph.get(todo.pop(), set()) - seen:
            seen.add(other)
            todo.append(other)
    return seen


def reachable(module: str) -> set[str]:
    """Return the names of all modules loaded by importing a module, through our own modules."""
    seen: set[str] = set()
    outside: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        names = imports(current, at_import_time_only=True)
        parents = {".".join(current.split(".")[:depth]) for depth in range(1, current.count(".") + 1)}
        todo.extend(name for name in names | parents if name in modules())
        outside.update(names)
    return outside | seen


def may_import(module: str) -> set[str]:
    """Return our other packages permitted as imports of a module."""
    return {"hyper_model", "server"} if module in MEASURED_WITHOUT_HTTP else MAY_IMPORT[top(module)]


def test_each_package_imports_only_what_it_may() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in imports(module)
        if top(name) in PACKAGES and top(name) != top(module) and top(name) not in may_import(module)
    ]
    assert not wrong


CLIENT_IMPORTS = {"server.api.types", "server.api.job_types", "hyper_model.proxies", "hyper_model.sse"}
"""All that the client imports from other packages: the types of the API, and readers without dependencies."""


def test_the_client_shares_the_types_of_the_api_and_nothing_else_of_the_server() -> None:
    ours = {name for module in modules() if top(module) == "hyper" for name in imports(module) if top(name) in PACKAGES}
    assert {name for name in ours if top(name) != "hyper" and name in modules()} <= CLIENT_IMPORTS
    heavy = {"fastapi", "uvicorn", "av", "soundfile", *HEAVY}
    assert not heavy & {top(name) for module in modules() if top(module) == "hyper" for name in reachable(module)}


def test_only_the_adapters_import_vllm() -> None:
    allowed = VLLM_MODULES | {mirror_of(module) for module in VLLM_MODULES}
    assert not [
        module for module in modules() if module not in allowed and "vllm" in {top(name) for name in imports(module)}
    ]


@pytest.mark.parametrize("module", PURE_MODULES)
def test_a_pure_module_reaches_no_torch_and_no_engine(module: str) -> None:
    if module in modules():
        assert not HEAVY & {top(name) for name in reachable(module)}
        assert not HEAVY & {top(name) for name in imports(module)}, "not inside a function either"


def test_in_the_service_only_the_engine_adapter_touches_tensors() -> None:
    assert not [
        module
        for module in modules()
        if top(module) == "server"
        and module != "server.engines.vllm"
        and HEAVY & {top(name) for name in imports(module)}
    ]


def test_the_model_package_knows_no_http() -> None:
    names = {module: {top(name) for name in imports(module)} for module in modules() if top(module) == "hyper_model"}
    assert not {module for module, tops in names.items() if tops & HTTP_LIBRARIES}


def test_loadtests_know_the_service_by_http_alone() -> None:
    names = {
        top(name)
        for module in modules()
        if top(module) == "loadtests" and module not in MEASURED_WITHOUT_HTTP
        for name in imports(module)
    }
    assert not names & (HEAVY | {"fastapi", "starlette"})
    # The peers run in their own processes, and heavy imports stay there.
    for module in ("loadtests.bench", "loadtests.rehearse"):
        assert not HEAVY & {top(name) for name in reachable(module)}


HELP = """
from hyper_model.cli import main
sys.argv = ["hyper", "--help"]
try:
    main()
except SystemExit as exit:
    assert not exit.code
"""


@pytest.mark.parametrize("code", ["import server, server.settings, server.commands", HELP], ids=["server", "help"])
def test_help_and_import_stay_light(code: str) -> None:
    """Run in a fresh interpreter, because this one may have loaded torch for another test."""
    check = f"import sys\n{code}\nprint(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    command = [sys.executable, "-c", check]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stderr.strip().splitlines()[-1:]) == (0, ["[]"]), run.stderr


@pytest.mark.parametrize("module", sorted(name for name in modules() if ".test_" not in name))
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"{module} has no docstring"


@pytest.mark.parametrize("package", LAYERS)
def test_units_import_only_lower_layers(package: str) -> None:
    layer = {f"{package}.{name}": number for number, names in enumerate(LAYERS[package]) for name in names.split()}
    units = {unit(module) for module in modules() if top(module) == package and module != package}
    assert units == set(layer), "LAYERS must name each unit once"
    assert not sorted(f"{one} -> {other}" for one, other in unit_arrows(package) if layer[one] <= layer[other])


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {module: {name for name in imports(module) if name in modules()} - {module} for module in modules()}
    assert not cycles(graph)


def test_a_folder_fits_in_one_view() -> None:
    sizes = Counter(module.rpartition(".")[0] for module, path in modules().items() if path.name != "__init__.py")
    assert not {folder: size for folder, size in sizes.items() if folder.startswith("training.") and size > 14}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not [module for module in modules() if VAGUE_NAMES.match(module.rpartition(".")[2])]


def configuration_fields() -> Iterator[tuple[str, str]]:
    """Yield (class, field) of each configuration class: Settings, ...Config, ...Recipe, ...Limits."""
    for module in modules():
        if top(module) == "tests":
            continue
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and re.search(r"(Settings|Config|Recipe|Limits)$", node.name):
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                        yield f"{module}.{node.name}", statement.target.id


def test_every_configuration_field_is_read_somewhere() -> None:
    read = {
        node.attr
        for module in modules()
        if top(module) != "tests"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = set(configuration_fields())
    assert fields, "no configuration found: the test looks in the wrong place"
    assert not sorted(f"{owner}.{field}" for owner, field in fields if field not in read)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_by_hash_and_names_no_place(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = [entry for entry in text.replace("\\\n", " ").splitlines() if entry and not entry.startswith("#")]
    assert entries
    for entry in entries:
        assert re.match(r"^[a-z0-9][a-z0-9._-]*==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry[:100]
    assert not re.search(r"://|index-url|find-links|^\s*/|@ |trusted-host", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_leaves_out_the_three_wheels_that_break_transformers(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    assert not BROKEN_BESIDE_CPU_TORCH & set(re.findall(r"^([a-z0-9._-]+)==", text, flags=re.MULTILINE))


def test_the_locks_agree_on_every_version() -> None:
    """Environments are built from several locks without a resolver, so the last version installed would win."""
    versions: dict[str, set[str]] = {}
    for name in LOCKS:
        if name == "gpu":
            continue  # it has its own environment
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        for package, version, marker in re.findall(r"^([a-z0-9._-]+)==(\S+)(?: ; (.*?))? \\", text, flags=re.MULTILINE):
            versions.setdefault(f"{package} {marker}", set()).add(version)
    assert not {package: found for package, found in versions.items() if len(found) > 1}


def test_torch_is_the_same_release_wherever_it_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = {requirement for extra in extras.values() for requirement in extra if re.match(r"torch[=<>~]", requirement)}
    build = re.search(r"^(torch==[\d.]+)\+cpu$", (ROOT / "requirements/torch-cpu.txt").read_text(), flags=re.MULTILINE)
    assert build
    assert pins == {build[1]}
