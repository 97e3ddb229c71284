"""Compares what the code of two commits computes, to decide whether a record is stale.

The code of a commit is every top-level function, class and statement of the modules that a recipe
(or the worker of comparisons with peers) imports, directly or through others. Two commits compute
the same if these definitions are equal in a normal form, whichever module each one is in.

Not a change: comments, docstrings, annotations and layout; messages (text of two words or more,
and all arguments of an exception); a function, class or constant that moves to another module;
renamed local variables and parameters; any other renamed identifier of ours whose old name is gone
and whose new name is new; a function that is deleted because nothing uses it any more.

A change: everything else, such as a constant, an operator, another order, a call, a name of a
library (in full, whatever a module calls it), a hook of Lightning. A function that is split or
merged is a change too, although it may compute the same. That is for a measurement to prove:
`equivalent_code.json` lists pairs of commits with their proof (losses at a fixed seed and counters
that are equal bit for bit).

Missed: a change in text of two words that is used as data, two renamed functions that swap places,
files that are not Python, and packages other than torch (the report compares its version).
"""

import ast
import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unitransformer.record.fields import check_fields

FOLDERS = ("unitransformer", "recipes")
ENTRIES = ("recipes.bert", "recipes.gpt", "recipes.vit")
PEER_ENTRIES = (*ENTRIES, "unitransformer.peers.worker")  # of comparisons with peers
MESSAGE = re.compile(r"\w\W*\s\W*\w")  # two words or more
PROOFS = "scaling/equivalent_code.json"

Tree = frozenset[tuple[str, str]]  # paths and blobs


class Name(str):
    """An identifier in a normal form."""


@dataclass(eq=False)
class Module:
    """The identifiers in a module, and the normal forms of its definitions."""

    tree: ast.Module
    imports: set[str] = field(default_factory=set)  # dotted names
    names: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)  # that are read

    @functools.cached_property
    def forms(self) -> tuple[list[tuple[str, ...]], list[list[tuple[str, ...]]]]:
        """Of its functions, and of all else; a class comes with its methods."""
        functions, others = [], []
        definitions = (ast.ClassDef, ast.FunctionDef)
        outside = [s for s in self.tree.body if not isinstance(s, definitions)]
        origins = _origins(outside)
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef):
                methods = [s for s in statement.body if isinstance(s, ast.FunctionDef)]
                statement.body = [s for s in statement.body if s not in methods]
                others.append([_form(part, origins) for part in (statement, *methods)])
            elif isinstance(statement, ast.FunctionDef):
                functions.append(_form(statement, origins))
            elif form := _form(statement, origins):
                others.append([form])
        # Imports that the module does not use have an effect, or are for other modules.
        imports = [s for s in outside if isinstance(s, ast.Import | ast.ImportFrom)]
        for name, origin in _origins(imports).items():
            if name not in self.names and not isinstance(origin[-1], Name):
                others.append([("import", Name(name), *origin)])
        return functions, others


def compare_commits(
    checkout: Path, commits: Iterable[str], entries: Sequence[str] = ENTRIES
) -> dict[str, bool | None] | None:
    """Returns whether the code of each commit computes what that of HEAD does; None for a commit
    that is not in the checkout. Returns None if `checkout` is not a git checkout with such code.

    Args:
        entries: modules whose code is compared, with all that they import.

    Raises:
        ValueError: `PROOFS` in the checkout cannot be read.
    """
    if shutil.which("git") is None or not (head := _tree(checkout, "HEAD")):
        return None
    proofs = _proofs(checkout / PROOFS)
    trees = {c: _tree(checkout, c) for c in {*commits, *(c for proof in proofs for c in proof)}}
    blobs = {blob for tree in (head, *trees.values()) for _, blob in tree}
    sources = _read_blobs(checkout, blobs)

    equal = [head]  # trees that compute what HEAD does, the newest first

    @functools.cache
    def is_same(before: Tree, after: Tree) -> bool:
        return _is_same(_reached(before, sources, entries), _reached(after, sources, entries))

    def is_equal(tree: Tree) -> bool:
        # Comparing paths and blobs takes no time; parsing takes a second.
        return tree in equal or (bool(tree) and any(is_same(tree, other) for other in equal))

    for before, after in reversed(proofs):
        if is_equal(trees[after]):
            equal.append(trees[before])
    return {commit: is_equal(trees[commit]) if trees[commit] else None for commit in commits}


def _proofs(path: Path) -> list[tuple[str, str]]:
    """Returns the commits before and after each change that was proven to compute the same."""
    proofs = json.loads(path.read_text()) if path.exists() else []
    for index, proof in enumerate(proofs):
        kinds = dict.fromkeys(("before", "after", "proof"), str)
        check_fields(proof, kinds, f"{path.name}.{index}")
    return [(proof["before"], proof["after"]) for proof in proofs]


def _tree(checkout: Path, commit: str) -> Tree:
    """Returns paths and blobs of the Python files; none if there is no such commit or file."""
    command = ["git", "-C", str(checkout), "ls-tree", "-rz", "--end-of-options", commit, *FOLDERS]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    lines = (line.partition("\t") for line in done.stdout.decode().split("\0") if line)
    return frozenset((path, about.split()[2]) for about, _, path in lines if path.endswith(".py"))


def _read_blobs(checkout: Path, blobs: Iterable[str]) -> dict[str, bytes]:
    command = ["git", "-C", str(checkout), "cat-file", "--batch"]
    requests = "".join(f"{blob}\n" for blob in blobs).encode()
    rest = subprocess.run(command, capture_output=True, input=requests, check=True).stdout
    sources = {}
    while rest:
        header, _, rest = rest.partition(b"\n")
        blob, _, size = header.decode().split()
        sources[blob], rest = rest[: int(size)], rest[int(size) + 1 :]
    return sources


def _reached(tree: Tree, sources: Mapping[str, bytes], entries: Sequence[str]) -> list[Module]:
    """Returns the modules that the entries import, directly or through others."""
    blobs = {p.removesuffix(".py").removesuffix("/__init__").replace("/", "."): b for p, b in tree}
    reached: dict[str, Module] = {}
    waiting = [entry for entry in entries if entry in blobs]
    while waiting:
        name = waiting.pop()
        if name in blobs and name not in reached:
            reached[name] = _parse(sources[blobs[name]])
            # An imported name may be a module or something in one; packages come before both.
            for origin in reached[name].imports:
                parts = origin.split(".")
                waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return list(reached.values())


def _is_same(before: list[Module], after: list[Module]) -> bool:
    functions, others = _digests(before, after)
    new_functions, new_others = _digests(after, before)
    return new_functions <= functions and new_others == others


def _digests(side: list[Module], other: list[Module]) -> tuple[set[str], set[str]]:
    """Returns digests of all functions and of all else; names of this side alone are numbered."""
    attributes = set[str]().union(*(module.attributes for module in side))
    methods = set[str]().union(*(module.methods for module in side))
    # A method that only a library calls, such as a hook, means something by its name.
    ours = set[str]().union(*(module.defined for module in side)) | (methods & attributes)
    renamed = ours - set[str]().union(*(module.names for module in other))

    def text(tokens: tuple[str, ...]) -> str:
        numbers: dict[str, str] = {}
        return "\0".join(
            numbers.setdefault(token, f"name {len(numbers)}")
            if isinstance(token, Name) and token in renamed
            else token
            for token in tokens
        )

    forms = [module.forms for module in side if module not in other]  # one in both is the same
    functions = {_digest(text(tokens)) for parts, _ in forms for tokens in parts}
    others = {_digest("\1".join(sorted(map(text, part)))) for _, parts in forms for part in parts}
    return functions, others


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------- normal form


@functools.cache
def _parse(source: bytes) -> Module:
    module = Module(ast.parse(source))
    for node in ast.walk(module.tree):
        _note_names(node, module)
    return module


def _note_names(node: ast.AST, module: Module) -> None:
    """Notes which identifiers are in use, and which of them are defined here."""
    match node:
        case ast.ImportFrom(module=str(origin), names=names):
            module.imports |= {f"{origin}.{alias.name}" for alias in names}
        case ast.Import(names=names):
            module.imports |= {alias.name for alias in names}
        case ast.Attribute(attr=name, ctx=ast.Load()):
            module.names.add(name)
            module.attributes.add(name)
        case ast.Name(id=name, ctx=ast.Load()):
            module.names.add(name)
        case (
            ast.ClassDef(name=name)
            | ast.Attribute(attr=name)
            | ast.Name(id=name)
            | ast.arg(arg=name)
        ):
            module.names.add(name)
            module.defined.add(name)
        case ast.FunctionDef(name=name):
            module.names.add(name)
        case ast.keyword(arg=str(name)):
            module.names.add(name)
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            module.names.add(name)
        case ast.Dict(keys=keys):
            keyed = {k.value for k in keys if isinstance(k, ast.Constant)}
            module.names |= {key for key in keyed if isinstance(key, str)}
            module.defined |= {key for key in keyed if isinstance(key, str)}
        case ast.Module(body=body):
            module.defined |= {s.name for s in body if isinstance(s, ast.FunctionDef)}
            classes = [s for s in body if isinstance(s, ast.ClassDef)]
            module.methods |= {
                s.name for c in classes for s in c.body if isinstance(s, ast.FunctionDef)
            }


def _origins(statements: Iterable[ast.AST]) -> dict[str, tuple[str, ...]]:
    """Returns the tokens that stand for each imported name: what it is, not what it is called here.

    A name of a library is written in full, as "torch", ".", "nn"; one of ours is an identifier.
    """
    origins: dict[str, tuple[str, ...]] = {}
    for node in (node for statement in statements for node in ast.walk(statement)):
        match node:
            case ast.Import(names=names):
                found = [(a.asname or a.name.partition(".")[0], a.name, a.asname) for a in names]
                paths = {n: path if renamed else n for n, path, renamed in found}
            case ast.ImportFrom(module=module, names=names, level=level):
                package = FOLDERS[0] if level else module
                paths = {a.asname or a.name: f"{package}.{a.name}" for a in names}
            case _:
                continue
        for name, path in paths.items():
            first, *rest = path.split(".")
            if first in FOLDERS:
                origins[name] = (Name(rest[-1] if rest else first),)
            elif first != "__future__":
                origins[name] = (first, *(token for part in rest for token in (".", part)))
    return origins


def _form(statement: ast.AST, origins: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the tokens of a definition; its local variables are numbered by first use."""
    local: dict[str, str] = {}
    if isinstance(statement, ast.FunctionDef):
        for node in ast.walk(statement):
            match node:
                case (
                    ast.arg(arg=name)
                    | ast.Name(id=name, ctx=ast.Store())
                    | ast.ExceptHandler(name=str(name))
                    | ast.MatchAs(name=str(name))
                ):
                    local[name] = f"local {len(local)}" if name not in local else local[name]
                case ast.FunctionDef(name=name) if node is not statement:
                    local[name] = f"local {len(local)}" if name not in local else local[name]
    hidden = {name: (token,) for name, token in local.items()}  # hides an import of this name
    return tuple(_tokens(statement, {**origins, **_origins([statement]), **hidden}))


def _tokens(node: ast.AST | None, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    match node:
        case None | ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return
        case ast.Name(id=name) | ast.arg(arg=name):
            yield from known.get(name) or (Name(name),)
        case ast.Attribute(value=value, attr=name):
            yield from (*_tokens(value, known), ".", Name(name))
        case ast.keyword(arg=name, value=value):
            yield from (Name(name or "**"), *_tokens(value, known))
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            yield from ("item", *_tokens(value, known), Name(key))
        case ast.Dict(keys=keys, values=values):
            for label, item in zip(keys, values, strict=True):
                if isinstance(label, ast.Constant) and isinstance(label.value, str):
                    yield Name(label.value)
                else:
                    yield from _tokens(label, known)
                yield from (":", *_tokens(item, known))
        case ast.Constant(value=str(text)):
            yield "message" if MESSAGE.search(text) else repr(text)
        case ast.JoinedStr(values=values):
            parts = (v.value if isinstance(v, ast.Constant) else "x" for v in values)
            is_message = MESSAGE.search("".join(map(str, parts)))
            yield from ["message"] if is_message else _fields(node, known)
        case ast.Raise(exc=ast.Call(func=kind)) | ast.Raise(exc=kind):
            yield from ("raise", *_tokens(kind, known))
        case ast.AnnAssign(target=target, value=value):
            yield from ("Assign", "[", *_tokens(target, known), "]", *_tokens(value, known))
        case ast.FunctionDef(name=name, args=args, body=body, decorator_list=decorators):
            yield from ("def", *(known.get(name) or (Name(name),)))
            for part in (*decorators, args, *body):
                yield from _tokens(part, known)
            yield "end"
        case ast.ClassDef(name=name):
            yield from ("class", Name(name), *_fields(node, known))
        case _:
            yield type(node).__name__
            yield from _fields(node, known)


def _fields(node: ast.AST, known: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for key, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield from _tokens(value, known)
        elif isinstance(value, list):
            yield "["
            for item in value:
                yield from _tokens(item, known) if isinstance(item, ast.AST) else [str(item)]
            yield "]"
        elif key not in ("name", "lineno", "type_comment"):
            yield str(value)
