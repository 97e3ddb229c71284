"""Says which commits hold code that computes the same as that of HEAD.

What counts as the code of a commit is every definition that a recipe reaches: a function, a class,
or a top-level statement of a module that is reached from `recipes/{bert,gpt,vit}.py` by name,
whichever module it is in. Two commits compute the same if the sets of these definitions are equal
in a normal form, so plots, export and other commands that no recipe reaches do not matter, and
neither does code that nothing uses.

These are no change: comments, docstrings, annotations, layout; text (a string literal of two words
or more, and all that an exception is given); a function, class or constant that moves to another
module or is renamed; renamed local variables and parameters; an attribute, keyword or string key
that is renamed to a name that the older commit does not use anywhere, once the old name is gone.

These are changes: a constant, an operator, another order, a call that is added or taken away, a
name of torch, Lightning or the standard library, a string of one word, another definition behind a
name. A function that is split or merged is a change too, although it may compute the same. Whether
it does, a measurement shows: `equivalent_code.json` lists pairs of commits that are equal by proof,
each with what was compared (losses at a fixed seed and counters, bit for bit).

It misses a change in what a text of two words says where that text is data, in code that is reached
by `getattr` or by a name in a file, in packages other than torch (the report compares its version),
and in files that are not Python.
"""

import ast
import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unitransformer.record.fields import check_fields

FOLDERS = ("unitransformer", "recipes")
ENTRIES = ("recipes.bert", "recipes.gpt", "recipes.vit")
TEXT = re.compile(r"\w\W*\s\W*\w")  # two words or more
PROOFS = "scaling/equivalent_code.json"
ROUNDS = 2  # a definition is known by what it refers to, and what that refers to

Tree = frozenset[tuple[str, str]]  # paths and blobs
Token = str | tuple[str, str]  # itself; or a kind ("name", "ref") and what it is of
Key = tuple[str, str]  # a module and a name in it


@dataclass
class Definition:
    """A top-level statement: its tokens, and those of each method, which may stand in any order."""

    parts: list[list[Token]] = field(default_factory=lambda: [[]])
    references: set[str] = field(default_factory=set)  # dotted names, imports not yet followed


@dataclass
class Module:
    """What a module defines and imports, and the identifiers in it."""

    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    effects: list[Definition] = field(default_factory=list)  # statements that bind no name
    imports: dict[str, str] = field(default_factory=dict)  # a local name: its dotted origin
    names: set[str] = field(default_factory=set)  # attributes, keywords and keys
    loaded: set[str] = field(default_factory=set)  # attributes that are read
    own: set[str] = field(default_factory=set)  # names that are defined here
    methods: set[str] = field(default_factory=set)


def compare_commits(checkout: Path, commits: Iterable[str]) -> dict[str, bool | None] | None:
    """Whether the code of each commit computes what that of HEAD does; None for a commit that is
    not there. None for all where `checkout` is in no git checkout, or HEAD has no such code there.

    Raises:
        ValueError: `PROOFS` in the checkout cannot be read.
    """
    if shutil.which("git") is None or not (head := _tree(checkout, "HEAD")):
        return None
    proofs = _proofs(checkout / PROOFS)
    proven = {commit for proof in proofs for commit in proof}
    trees = {commit: _tree(checkout, commit) for commit in {*commits, *proven}}
    sources = _sources(checkout, {sha for tree in (head, *trees.values()) for _, sha in tree})

    @functools.cache
    def is_same(one: Tree, other: Tree) -> bool:
        if one == other or not (one and other):
            return one == other
        there, here = _modules(one, sources), _modules(other, sources)
        return _digests(there, here) == _digests(here, there)

    equal = [head]  # to what HEAD computes, the newest first
    for before, after in reversed(proofs):
        if any(is_same(trees[after], tree) for tree in equal):
            equal.append(trees[before])
    return {
        commit: any(is_same(trees[commit], tree) for tree in equal) if trees[commit] else None
        for commit in commits
    }


def _proofs(path: Path) -> list[tuple[str, str]]:
    """Commits before and after each change that was proven to compute the same, in their order."""
    if not path.exists():
        return []
    proofs = json.loads(path.read_text())
    for index, proof in enumerate(proofs):
        check_fields(
            proof, dict.fromkeys(("before", "after", "proof"), str), f"{path.name}.{index}"
        )
    return [(proof["before"], proof["after"]) for proof in proofs]


# ---------------------------------------------------------------------------------------- git


def _tree(checkout: Path, commit: str) -> Tree:
    """Paths and blobs of the Python files; empty where there is no such commit or no such file."""
    command = ["git", "-C", str(checkout), "ls-tree", "-rz", "--end-of-options", commit, *FOLDERS]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    lines = (line.partition("\t") for line in done.stdout.decode().split("\0") if line)
    return frozenset((path, about.split()[2]) for about, _, path in lines if path.endswith(".py"))


def _sources(checkout: Path, blobs: Iterable[str]) -> dict[str, bytes]:
    command = ["git", "-C", str(checkout), "cat-file", "--batch"]
    asked = "".join(f"{blob}\n" for blob in blobs).encode()
    rest = subprocess.run(command, capture_output=True, input=asked, check=True).stdout
    sources = {}
    while rest:
        head, _, rest = rest.partition(b"\n")
        blob, _, size = head.decode().split()
        sources[blob], rest = rest[: int(size)], rest[int(size) + 1 :]
    return sources


# ------------------------------------------------------------------------------- normal form


def _modules(tree: Tree, sources: Mapping[str, bytes]) -> dict[str, Module]:
    names = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): blob
        for path, blob in tree
    }
    return {name: _read(sources[blob]) for name, blob in names.items()}


@functools.cache
def _read(source: bytes) -> Module:
    module = Module()
    for statement in ast.parse(source).body:
        _add(statement, module)
    return module


def _add(statement: ast.stmt, module: Module) -> None:
    match statement:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            for inner in statement.body:
                _add(inner, module)
        case ast.Expr(value=ast.Constant()):
            pass  # a docstring
        case ast.Import() | ast.ImportFrom():
            _import(statement, module)
        case _:
            writer = _Writer(module)
            bound = _bound(statement)
            writer.write(statement, bound)
            for name in bound:
                module.definitions.setdefault(name, []).append(writer.definition)
            if not bound:
                module.effects.append(writer.definition)


def _import(statement: ast.Import | ast.ImportFrom, module: Module) -> None:
    for alias in statement.names:
        if isinstance(statement, ast.ImportFrom):
            module.imports[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
        else:
            first = alias.name.partition(".")[0]
            module.imports[alias.asname or first] = alias.name if alias.asname else first


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            nodes = [node for target in targets for node in ast.walk(target)]
        case ast.AnnAssign(target=target):
            nodes = list(ast.walk(target))
        case _:
            return []
    return [node.id for node in nodes if isinstance(node, ast.Name)]


class _Writer:
    """Writes the tokens of a top-level statement, and collects the identifiers in it."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.definition = Definition()
        self.tokens = self.definition.parts[0]
        self.local: dict[str, int] = {}  # by order of first use

    def write(self, statement: ast.stmt, bound: Iterable[str]) -> None:
        if not isinstance(statement, ast.ClassDef):
            self._scope(statement, bound)
            return
        self.tokens.append("class")
        for node in (*statement.bases, *statement.keywords, *statement.decorator_list):
            self._node(node)
        for inner in statement.body:
            if isinstance(inner, ast.FunctionDef):
                self.tokens = []
                self.definition.parts.append(self.tokens)
                self._name(inner.name)
                self.module.methods.add(inner.name)
                self._scope(inner, [inner.name])
                self.tokens, self.local = self.definition.parts[0], {}
            else:
                self.module.own |= {*_bound(inner)}
                for name in _bound(inner):
                    self._name(name)
                self._node(inner)

    def _scope(self, scope: ast.AST, bound: Iterable[str]) -> None:
        names = set[str]()
        for node in ast.walk(scope):
            match node:
                case ast.arg(arg=name):
                    self.module.own.add(name)  # callers name it
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name):
                    names.add(name)
                case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                    names.add(name)
                case ast.Import() | ast.ImportFrom():
                    _import(node, self.module)
        self.local = dict.fromkeys(names - {*bound}, -1)
        self._node(scope)

    def _name(self, name: str) -> None:
        self.tokens.append(("name", name))
        self.module.names.add(name)

    def _refer(self, dotted: str) -> None:
        self.tokens.append(("ref", dotted))
        self.definition.references.add(dotted)

    def _nodes(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self._node(node)

    def _node(self, node: ast.AST) -> None:
        write = getattr(self, f"_{type(node).__name__}", None)
        if write is not None:
            write(node)
            return
        self.tokens.append(type(node).__name__)
        for _, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                self._node(value)
            elif isinstance(value, list):
                self.tokens.append("[")
                for item in value:
                    self._node(item) if isinstance(item, ast.AST) else self.tokens.append(str(item))
                self.tokens.append("]")
            elif isinstance(value, int | None):
                self.tokens.append(str(value))

    def _Name(self, node: ast.Name) -> None:
        self._variable(node.id)

    def _variable(self, name: str) -> None:
        place = self.local.get(name)
        if place is None:
            self._refer(name)
            return
        if place < 0:
            place = self.local[name] = sum(known >= 0 for known in self.local.values())
        self.tokens.append(f"local {place}")

    def _Attribute(self, node: ast.Attribute) -> None:
        dotted, inner = node.attr, node.value
        while isinstance(inner, ast.Attribute):
            dotted, inner = f"{inner.attr}.{dotted}", inner.value
        if isinstance(inner, ast.Name) and inner.id not in self.local:
            self._refer(f"{inner.id}.{dotted}")
            return
        self._node(node.value)
        self.tokens.append(".")
        self._name(node.attr)
        if isinstance(node.ctx, ast.Load):
            self.module.loaded.add(node.attr)
        else:
            self.module.own.add(node.attr)

    def _keyword(self, node: ast.keyword) -> None:
        self._name(node.arg or "**")
        self._node(node.value)

    def _Subscript(self, node: ast.Subscript) -> None:
        self.tokens.append("item")
        self._node(node.value)
        self._key(node.slice)

    def _Dict(self, node: ast.Dict) -> None:
        self.tokens.append("dict")
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self.module.own.add(key.value)
            self.tokens.append("**") if key is None else self._key(key)
            self._node(value)
        self.tokens.append("]")

    def _key(self, node: ast.AST) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self._name(node.value)
        else:
            self._node(node)

    def _Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and TEXT.search(node.value):
            self.tokens.append("text")
        elif isinstance(node.value, str) and node.value.startswith(tuple(f"{f}." for f in FOLDERS)):
            self._refer(node.value)  # a module that is started by its name
        else:
            self.tokens.append(repr(node.value))

    def _JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = (v.value if isinstance(v, ast.Constant) else "x" for v in node.values)
        if TEXT.search("".join(map(str, parts))):
            self.tokens.append("text")
        else:
            self._nodes(node.values)

    def _Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.tokens.append("do")
            self._node(node.value)

    def _Raise(self, node: ast.Raise) -> None:
        self.tokens.append("raise")
        self._nodes([node.exc.func if isinstance(node.exc, ast.Call) else node.exc])

    def _Import(self, node: ast.Import | ast.ImportFrom) -> None:
        pass

    _ImportFrom = _Import

    def _arg(self, node: ast.arg) -> None:
        self._variable(node.arg)
        self._annotation(node.annotation)

    def _AnnAssign(self, node: ast.AnnAssign) -> None:
        self.tokens.append("Assign")
        if not (isinstance(node.target, ast.Name) and node.target.id not in self.local):
            self._node(node.target)
        self._annotation(node.annotation)
        self._nodes([node.value])

    def _Assign(self, node: ast.Assign) -> None:
        self.tokens.append("Assign")
        for target in node.targets:
            if not (isinstance(target, ast.Name) and target.id not in self.local):
                self._node(target)
        self._node(node.value)

    def _annotation(self, node: ast.AST | None) -> None:
        """It computes nothing, but an option's class may be reached by nothing else."""
        if node is not None:
            names = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            self.definition.references |= {*names}

    def _FunctionDef(self, node: ast.FunctionDef) -> None:
        self.tokens.append("def")
        if node.name in self.local:
            self._variable(node.name)
        self._nodes([*node.decorator_list, node.args])
        self._annotation(node.returns)
        self._nodes(node.body)
        self.tokens.append("end")


# ---------------------------------------------------------------------------------- digests


def _digests(modules: Mapping[str, Module], others: Mapping[str, Module]) -> frozenset[str]:
    """Of every definition that a recipe reaches; names that only one side knows are numbered."""
    loaded = set[str]().union(*(module.loaded for module in modules.values()))
    methods = set[str]().union(*(module.methods for module in modules.values()))
    own = set[str]().union(*(module.own for module in modules.values()))
    elsewhere = set[str]().union(*(module.names for module in others.values()))
    renamed = (own | (methods & loaded)) - elsewhere  # a method that only Lightning calls is not
    reached = _reach(modules)
    colours: dict[Key, str] = {}
    for _ in range(ROUNDS):
        colours = {
            (module, name): "".join(
                sorted(_digest(d, modules, module, colours, renamed) for d in definitions)
            )
            for module, name, definitions in reached
        }
    return frozenset(colours.values())


def _reach(modules: Mapping[str, Module]) -> list[tuple[str, str, list[Definition]]]:
    """Definitions by their module and name; those of no name are what a module does itself."""
    found: dict[Key, list[Definition]] = {}
    asked: list[Key] = [(entry, "") for entry in ENTRIES if entry in modules]
    while asked:
        module, name = key = asked.pop()
        if key in found:
            continue
        read = modules[module]
        found[key] = read.definitions[name] if name else read.effects
        asked.append((module, ""))
        for reference in set[str]().union(*(d.references for d in found[key])):
            target, _ = _resolve(modules, module, reference)
            asked += [] if target is None else [target]
    return [(*key, definitions) for key, definitions in found.items() if definitions]


def _resolve(modules: Mapping[str, Module], module: str, dotted: str) -> tuple[Key | None, str]:
    """The definition that is meant, if it is ours, and what follows; else the full name."""
    first, _, rest = dotted.partition(".")
    if first in modules[module].definitions:
        return (module, first), rest
    full = f"{modules[module].imports.get(first, first)}{rest and '.'}{rest}"
    for end in range(len(full), 0, -1):
        if full[:end] in modules and full[end : end + 1] in ("", "."):
            inside = full[end + 1 :]
            if not inside:
                return (full, ""), ""
            first = inside.partition(".")[0]
            known = first in modules[full[:end]].definitions
            if known or first in modules[full[:end]].imports:
                return _resolve(modules, full[:end], inside)
    return None, full


def _digest(
    definition: Definition,
    modules: Mapping[str, Module],
    module: str,
    colours: Mapping[Key, str],
    renamed: set[str],
) -> str:
    parts = []
    for tokens in definition.parts:
        numbers: dict[str, str] = {}
        written = []
        for token in tokens:
            if isinstance(token, str):
                written.append(token)
                continue
            kind, name = token
            if kind == "ref":
                target, name = _resolve(modules, module, name)
                written.append("ours" if target is None else f"ours {colours.get(target, '')}")
                if target is None:
                    written.append(name)
                    continue
            for attribute in name.split(".") if name else ():
                is_new = attribute in renamed
                number = numbers.setdefault(attribute, f"name {len(numbers)}")
                written.append(number if is_new else attribute)
        parts.append("\0".join(written))
    return hashlib.sha256("\1".join([parts[0], *sorted(parts[1:])]).encode()).hexdigest()
