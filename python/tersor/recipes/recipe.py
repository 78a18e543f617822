"""A recipe: what is done to a model, one step after another, in Python or in YAML.

    calibration: {sources: [text.txt], samples: 128}
    evaluate: {text: {held-out: held_out.txt}, speed: true}     # of every stage
    steps:
      - shrink: {ffn: 0.25, layers: 2}
      - distill: {steps: 300, temperature: 2.0}
      - export: {folder: distilled}                             # keep the model of this stage
      - quantize: {bits: 4, activations: int8}

A file names other files in its own folder or below it; whatever lies elsewhere is named by whoever
runs it.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tersor.calibrate import BOS, Calibration
from tersor.errors import TersorError
from tersor.steps import STEPS, Step

READY = ("cloud", "edge", "realtime", "mobile")
KEEP = ("last", "all")
LONGEST = 200  # bytes of a folder's name, to which more is added while it is made
_LARGEST = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class Evaluate:
    """How good a model is on some texts, against the one that the recipe begins with.

    text: name -> file, or a file. samples: windows of each, None all. seq_len: tokens of a window,
    None as in `tersor eval`. bos: as in Calibration. speed: measure tokens per second too.
    """

    text: str | Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    seq_len: int | None = None
    bos: str = "auto"
    speed: bool = False

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise TersorError(f"bos is {', '.join(BOS)}, not {self.bos!r}")
        if not self.text and not self.speed:
            raise TersorError("evaluate needs text, name: FILE, or speed: true")
        for name in ("samples", "seq_len"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise TersorError(f"{name} is a whole number, 1 or more, not {reprlib.repr(value)}")

    @property
    def files(self) -> dict[str, str]:
        """By name; a file alone has its own."""
        if isinstance(self.text, str):
            return {Path(self.text).stem: self.text}
        return dict(self.text)


@dataclass(frozen=True)
class Export:
    """Keeps the model as it is now, in the folder of that name below `stages` in the output."""

    folder: str

    def __post_init__(self) -> None:
        name = self.folder
        if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
            raise TersorError(f"folder is the name of a folder to make, not {name!r}")
        if "/" in name or "\\" in name or name.startswith("-"):
            raise TersorError(f"folder is a plain name, which is made below `stages`, not {name!r}")
        if len(os.fsencode(name)) > LONGEST:
            raise TersorError(
                f"folder is a name of at most {LONGEST} bytes, not {reprlib.repr(name)} with "
                f"{len(os.fsencode(name))}; choose a shorter one"
            )


# What a recipe lists beside the steps that write a model.
MARKS: dict[str, type[Evaluate | Export]] = {"evaluate": Evaluate, "export": Export}


@dataclass(frozen=True)
class Recipe:
    """steps: in order; of them at least one that writes a model. calibration: the text of those
    that need some. evaluate: measured for the original and after every step.
    keep: "all" keeps the model of every stage, "last" that of the last and what Export names.
    """

    steps: tuple[Step | Evaluate | Export, ...]
    calibration: Calibration | None = None
    evaluate: Evaluate | None = None
    keep: str = "last"
    name: str = "recipe"

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise TersorError(f"keep is {' or '.join(KEEP)}, not {reprlib.repr(self.keep)}")
        if not any(isinstance(step, Step) for step in self.steps):
            raise TersorError(f"a recipe needs a step that changes the model: {', '.join(STEPS)}")

    @classmethod
    def read(cls, file: str | Path) -> Recipe:
        """From a YAML file, or the name of one of READY. TersorError for anything that is not
        known, with the place where it stands."""
        if str(file) in READY:
            return cls._parse(ready_file(str(file)).read_text(encoding="utf-8"), str(file), None)
        path = Path(file)
        try:
            if path.stat().st_size > _LARGEST:
                raise TersorError(f"{path} is too large for a recipe; give a YAML file of steps")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TersorError(
                f"there is no recipe {path}; give a YAML file, or {', '.join(READY)}"
            ) from None
        except UnicodeDecodeError:
            raise TersorError(f"{path} is not UTF-8 text; give a YAML file") from None
        except OSError as error:
            raise TersorError(f"cannot read {path} ({error.strerror}); give a YAML file") from None
        return cls._parse(text, path.name, path.parent)

    @classmethod
    def _parse(cls, text: str, name: str, home: Path | None) -> Recipe:
        try:
            content = yaml.load(text, _Loader)  # a SafeLoader
        # ValueError and OverflowError: a date or a number that there is not, such as 2020-13-01.
        except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
            cause = " ".join(str(error).split())
            raise TersorError(f"{name} is not YAML that can be read ({cause})") from None
        if not isinstance(content, dict):
            raise TersorError(f"{name} is not a recipe; it has keys such as steps, calibration")
        known = ("steps", "calibration", "evaluate", "keep")
        for key in content:
            if key not in known:
                raise TersorError(f"{name}: {key!r} is not of a recipe; it has {', '.join(known)}")
        listed = content.get("steps")
        if not isinstance(listed, list) or not listed:
            raise TersorError(f"{name}: steps is a list, of {', '.join((*STEPS, *MARKS))}")
        try:
            calibration = content.get("calibration")
            evaluate = content.get("evaluate")
            return cls(
                steps=tuple(_step(number, each, home) for number, each in enumerate(listed, 1)),
                calibration=None if calibration is None else _calibration(calibration, home),
                evaluate=None if evaluate is None else _evaluate(evaluate, home, "evaluate"),
                keep=content.get("keep", "last"),
                name=name,
            )
        except TersorError as error:
            raise TersorError(f"{name}: {error}") from None

    def to_dicts(self) -> list[dict[str, Any]]:
        """The steps as YAML has them, without what is as by default."""
        return [{name_of(step): settings_of(step)} for step in self.steps]

    def to_yaml(self) -> str:
        """As a file. Files that it names must lie beside it for read() to take them."""
        content: dict[str, Any] = {}
        if self.calibration is not None:
            content["calibration"] = settings_of(self.calibration)
        if self.evaluate is not None:
            content["evaluate"] = settings_of(self.evaluate)
        if self.keep != "last":
            content["keep"] = self.keep
        for step in self.steps:
            if not isinstance(getattr(step, "method", ""), str):
                raise TersorError(f"{step} has a solver of its own, which YAML cannot name")
        content["steps"] = self.to_dicts()
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


_PLAIN = (str, int, float, list, type(None))


def name_of(step: Step | Evaluate | Export) -> str:
    return step.name if isinstance(step, Step) else type(step).__name__.lower()


def settings_of(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, in the types of YAML."""
    found = {}
    for each in fields(thing):
        value = getattr(thing, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if value != default:
            found[each.name] = list(value) if isinstance(value, tuple) else value
            if isinstance(value, Mapping):
                found[each.name] = dict(value)
            elif not isinstance(found[each.name], _PLAIN):  # a solver with settings of its own
                found[each.name] = repr(value)
    return found


def _step(number: int, given: Any, home: Path | None) -> Step | Evaluate | Export:
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, dict) or len(given) != 1:
        raise TersorError(
            f"step {number} is one name with its settings, such as prune: {{pattern: '2:4'}}"
        )
    name, settings = next(iter(given.items()))
    settings = {} if settings is None else settings
    try:
        if name not in STEPS and name not in MARKS:
            raise TersorError(f"there is no such step; there are {', '.join((*STEPS, *MARKS))}")
        if name == "evaluate":
            return _evaluate(settings, home, "evaluate")
        made = _made(STEPS.get(name) or MARKS[name], settings)
        text = getattr(made, "text", ())
        if text:
            made = replace(made, text=tuple(_inside(home, each) for each in text))
        teacher = getattr(made, "teacher", None)
        if teacher not in (None, "original"):
            made = replace(made, teacher=_inside(home, teacher))
        return made
    except TersorError as error:
        raise TersorError(f"step {number}, {name}: {error}") from None


def _calibration(given: Any, home: Path | None) -> Calibration:
    if isinstance(given, (str, list)):
        given = {"sources": given}
    made: Calibration = _made(Calibration, given)
    return replace(made, sources=tuple(_inside(home, source) for source in made.sources))


def _evaluate(given: Any, home: Path | None, what: str) -> Evaluate:
    if not isinstance(given, dict):
        raise TersorError(f"{what} has settings such as text and speed, not {reprlib.repr(given)}")
    text = given.get("text", {})
    text = {Path(text).stem: text} if isinstance(text, str) else text
    pairs = isinstance(text, dict) and all(isinstance(x, str) for p in text.items() for x in p)
    if not pairs:
        raise TersorError(f"text of {what} is a file, or names with a file each")
    made: Evaluate = _made(Evaluate, given | {"text": {}, "speed": True})
    speed = given.get("speed", False)
    if not isinstance(speed, bool):
        raise TersorError(f"speed is true or false, not {reprlib.repr(speed)}")
    return replace(made, text={k: _inside(home, v) for k, v in text.items()}, speed=speed)


def _inside(home: Path | None, name: str) -> str:
    """A file that a recipe names, from where the recipe is."""
    if home is None:
        raise TersorError(f"a ready recipe names no files, and this names {name}")
    if not name.isprintable():
        raise TersorError(f"{name!r} is not the name of a file")
    path = os.path.abspath(os.path.join(home, name))
    root = os.path.realpath(home)
    # `name.jsonl:field` is a file with one field of its lines; both readings must be inside.
    reals = [os.path.realpath(each) for each in (path, path.rpartition(":")[0] or path)]
    if os.path.isabs(name) or any(os.path.commonpath([root, real]) != root for real in reals):
        raise TersorError(
            f"{name} is not in the folder of the recipe; put it there, or name it on the command "
            "line (--calibration, --text, --teacher)"
        )
    return path


_TYPES: dict[str, Any] = {  # of annotations of settings
    "int": lambda x: type(x) is int,
    "float": lambda x: type(x) in (int, float),
    "bool": lambda x: type(x) is bool,
    "str": lambda x: type(x) is str,
    "None": lambda x: x is None,
    "tuple[str, ...]": lambda x: isinstance(x, tuple) and all(type(each) is str for each in x),
    "tuple[int, ...]": lambda x: isinstance(x, tuple) and all(type(each) is int for each in x),
    "Mapping[str, str]": lambda x: isinstance(x, dict),
}
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word (in quotes where YAML would take it for a number, as it does 2:4)",
    "None": "null",
    "tuple[str, ...]": "a list of words",
    "tuple[int, ...]": "a list of whole numbers",
}


def _made(kind: Any, settings: Any) -> Any:
    """A dataclass of settings, whose types YAML does not check."""
    if not isinstance(settings, dict):
        raise TersorError(f"settings are names with values, not {reprlib.repr(settings)}")
    known = {each.name: each for each in fields(kind)}
    given = {}
    for name, value in settings.items():
        if name not in known:
            raise TersorError(f"there is no setting {name!r}; there are {', '.join(known)}")
        types = [part for part in str(known[name].type).split(" | ") if part in _TYPES]
        if isinstance(value, str) and "str" not in types and "tuple[str, ...]" in types:
            value = [value]
        value = tuple(value) if isinstance(value, list) else value
        if not any(_TYPES[each](value) for each in types):
            wanted = " or ".join(_WORDS[each] for each in types if each in _WORDS)
            raise TersorError(f"{name} is {wanted}, not {reprlib.repr(value)}")
        given[name] = value
    for name, each in known.items():
        if each.default is MISSING and each.default_factory is MISSING and name not in given:
            raise TersorError(f"{name} is missing")
    return kind(**given)


def ready_file(name: str) -> Path:
    """The file of one of READY."""
    return Path(__file__).parent / "ready" / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last, and mappings that are
    merged (<<). Reads 2e-4 as a number, which YAML 1.1 does not."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if any(key.value == "<<" for key, _ in node.value):
            raise yaml.YAMLError("mappings are not merged with <<; write the settings out")
        seen = set()
        for key in (self.construct_object(each, deep=True) for each, _ in node.value):
            if not isinstance(key, Hashable):
                break  # yaml says what it thinks of that
            if key in seen:
                raise yaml.YAMLError(f"{key!r} stands twice, {str(node.start_mark).strip()}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
