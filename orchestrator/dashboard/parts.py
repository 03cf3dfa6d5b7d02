"""The words that pages are made of. What users wrote is only ever a text node, an attribute, or a cell of `Rows`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from orchestrator.dashboard.words import STATE_TONES, STATE_WORDS

Cell = str | dict[str, Any]


def tag(name: str, text: str = "", classes: str = "", **props: Any) -> Element:
    """An element of HTML with text in it."""
    element = Element(name).classes(classes)
    element._text = text or None
    element.props.update({key.rstrip("_").replace("_", "-"): value for key, value in props.items()})
    return element


def set_text(element: Element, text: str) -> None:
    """Change the text of a `tag`; says nothing to the browser where it is the same."""
    if (element._text or "") != text:
        element._text = text or None
        element.update()


def show(element: Element, visible: bool) -> None:
    if element.visible != visible:
        element.set_visibility(visible)


@contextmanager
def card(title: str = "", *, flush: bool = False, classes: str = "") -> Iterator[Element]:
    """A card with a heading; yields its head, for controls beside the heading. What follows lies in its body."""
    with tag("section", "", f"card {classes}"):
        with tag("div", "", "card-head") as head:
            if title:
                tag("h2", title, "grow")
        with tag("div", "", "card-body flush" if flush else "card-body"):
            yield head


def row(classes: str = "") -> Element:
    return tag("div", "", f"row {classes}")


def stack(classes: str = "") -> Element:
    return tag("div", "", f"stack {classes}")


def chip(state: str, *, big: bool = False) -> Element:
    """A job's state."""
    return tag("span", STATE_WORDS.get(state, state), f"chip {STATE_TONES.get(state, '')} {'big' if big else ''}")


def state_cell(state: str) -> Cell:
    return {"text": STATE_WORDS.get(state, state), "tone": STATE_TONES.get(state, "off")}


def link(text: str, href: str, classes: str = "", **props: Any) -> Element:
    return tag("a", text, classes, href=href, **props)


def button(text: str, on_click: Callable[[], Any], look: str = "", **props: Any) -> Element:
    element = tag("button", text, f"btn {look}", type="button", **props)
    element.on("click", lambda _: on_click())
    return element


def ago(at: datetime) -> Element:
    """How long ago; the browser counts on."""
    return tag("time", "…", "", datetime=at.isoformat(), data_ago="", title=at.isoformat(timespec="seconds"))


def empty(title: str, hint: str = "") -> AbstractContextManager[Element]:
    """What stands where there is nothing; further hints may be put into it."""
    with tag("div", "", "empty") as box:
        tag("p", title, "strong")
        if hint:
            tag("p", hint)
    return box


def facts(pairs: Sequence[tuple[str, str]]) -> Element:
    """Names and values in two columns; pairs without a value are left out."""
    with tag("dl", "", "facts") as box:
        for name, value in pairs:
            if value:
                tag("dt", name)
                tag("dd", value)
    return box


def meter(pct: float, tone: str, label: str) -> Element:
    """A bar of progress; `set_meter` moves it."""
    with tag("div", "", f"meter {tone}", role="progressbar", aria_valuemin=0, aria_valuemax=100) as bar:
        tag("span", "")
    bar.props["aria-label"] = label
    set_meter(bar, pct)
    return bar


def set_meter(bar: Element, pct: float) -> None:
    if bar.props.get("aria-valuenow") != pct:
        bar.props["aria-valuenow"] = pct
        (fill,) = bar.default_slot.children
        fill.style(f"width: {pct:.1f}%")
        bar.update()


class Rows(Element, component="components/rows.js"):
    """A table of data. `columns`: key, label, end (aligned right), sort (a word for `on_sort`)."""

    def __init__(
        self,
        caption: str,
        columns: Sequence[Mapping[str, Any]],
        *,
        selectable: bool = False,
        cards: bool = True,
        on_pick: Callable[[list[str]], Any] | None = None,
        on_sort: Callable[[str], Any] | None = None,
        on_act: Callable[[str, str], Any] | None = None,
    ) -> None:
        super().__init__()
        self.props.update(caption=caption, columns=list(columns), rows=[], selectable=selectable, cards=cards)
        if on_pick is not None:
            self.on("pick", lambda e: on_pick(_texts(e.args)))
        if on_sort is not None:
            self.on("sort", lambda e: on_sort(str(e.args)))
        if on_act is not None:
            self.on("act", lambda e: on_act(str(e.args["id"]), str(e.args["action"])))

    def show_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Draw these rows (each with an `id`); the same ones again cost nothing."""
        if self.props["rows"] != list(rows):
            self.props["rows"] = list(rows)
            self.update()

    def show_sort(self, sorted_by: str, descending: bool) -> None:
        self.props.update({"sorted": sorted_by, "descending": descending})
        self.update()

    def unpick(self) -> None:
        self.run_method("unpick")


class LogLines(Element, component="components/log_lines.js"):
    """Log lines; `append` adds (time, stream, level, message)."""

    def __init__(self) -> None:
        super().__init__()
        self.props["empty"] = "Reading …"

    def append(self, lines: Sequence[tuple[str, str, str, str]], follow: bool) -> None:
        self.run_method("append", [list(line) for line in lines], follow)

    def clear_lines(self) -> None:
        self.run_method("clear")

    def say(self, text: str) -> None:
        if self.props["empty"] != text:
            self.props["empty"] = text
            self.update()


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


class Chart:
    """A line chart with a heading. What it shows is sent to the browser and kept there."""

    def __init__(self, title: str, *, tall: bool = False) -> None:
        with tag("figure", "", "chart tall" if tall else "chart") as self.box:
            with tag("figcaption"):
                self._title = tag("h3", title)
            self._chart = ui.echart({})
        self._chart.props.update({"role": "img", "aria-label": f"Chart: {title}"})

    def draw(self, changes: Mapping[str, Any]) -> None:
        """Show `series` (name, steps, values, …), or change how they are shown: x, unit, log, smooth."""
        # JSON is JavaScript, whatever text is in it.
        self._chart.client.run_javascript(f"pw.drawIn({self._chart.id}, {json.dumps(dict(changes))})")

    def set_title(self, title: str) -> None:
        set_text(self._title, title)


# -- fields ------------------------------------------------------------------------------------------------------------
class Control(Element, component="components/control.js"):
    """Where something is written or chosen. Its text lives in the browser; we hear of it."""

    def __init__(self, value: str, on_written: Callable[[str], Any], **props: Any) -> None:
        super().__init__()
        self.props.update({"initial": value, "wait": 350, **props})
        self._heard = 0

        def written(event: GenericEventArguments) -> Any:
            text, self._heard = str(event.args[0]), event.args[1]
            return on_written(text)

        self.on("written", written)

    def put(self, value: str) -> None:
        """Write into it, unless somebody has meanwhile."""
        self.run_method("put", value, self._heard)


class Field:
    """A labelled control of a form. `value` is what stands in it."""

    def __init__(
        self,
        label: str,
        value: str,
        on_change: Callable[[str], Any] | None,
        help: str,
        classes: str,
        props: Mapping[str, Any],
    ) -> None:
        self.value = value
        self._on_change = on_change
        with tag("label", "", f"field {classes}") as self.box:
            tag("span", label, "field-label")
            self.control = Control(value, self._written, **props)
        if help:
            with self.box:
                tag("span", help, "help")
        self._wrong: Element | None = None

    def _written(self, value: str) -> Any:
        self.value = value
        return self._on_change(value) if self._on_change is not None else None

    def say_wrong(self, message: str) -> None:
        """Show what is wrong with it; an empty message takes that away."""
        if self._wrong is None:
            if not message:
                return
            with self.box:
                self._wrong = tag("span", "", "wrong")
            self.control.props["aria-describedby"] = self._wrong.html_id
        set_text(self._wrong, message)
        self.control.props["aria-invalid"] = "true" if message else "false"

    def set_value(self, value: str) -> None:
        self.value = value
        self.control.put(value)


def text_field(
    label: str,
    value: str = "",
    on_change: Callable[[str], Any] | None = None,
    *,
    help: str = "",
    classes: str = "",
    rows: int = 0,
    placeholder: str = "",
) -> Field:
    """A line to write in, or with `rows` a field of several; `on_change` hears of it when the writer pauses."""
    props = {"placeholder": placeholder} | ({"lines": rows} if rows else {})
    return Field(label, value, on_change, help, classes, props)


def moment_field(label: str, on_change: Callable[[datetime | None], Any]) -> Field:
    """A date and a time of day, UTC; `on_change` hears None while it is not given in full."""

    def changed(text: str) -> Any:
        return on_change(datetime.fromisoformat(text).replace(tzinfo=UTC) if text else None)

    return Field(label, "", changed, "", "", {"moment": True})


def choice(
    label: str,
    options: Mapping[str, str],
    value: str,
    on_change: Callable[[str], Any] | None = None,
    *,
    help: str = "",
    classes: str = "",
) -> Field:
    """One of several: value -> what is shown."""
    return Field(label, value, on_change, help, classes, {"options": [list(option) for option in options.items()]})


def checkbox(label: str, value: bool, on_change: Callable[[bool], Any]) -> Element:
    with tag("label", "", "check") as box:
        control = tag("input", "", "", type="checkbox", checked=value)
        tag("span", label)
    control.on("change", lambda e: on_change(bool(e.args)), js_handler="(e) => emit(e.target.checked)")
    return box


def copy_button(text: str, what: str) -> Element:
    """Puts `text` into the clipboard."""
    element = tag("button", what, "btn", type="button", data_text=text)
    element.on(
        "click",
        js_handler="(e) => { const b = e.currentTarget, was = b.textContent; window.pw.copy(b.dataset.text); "
        "b.textContent = 'Copied'; setTimeout(() => (b.textContent = was), 1500); }",
    )
    return element


def dialog(title: str) -> tuple[ui.dialog, AbstractContextManager[Element]]:
    """A dialog, and its body to put things into."""
    box = ui.dialog()
    box.props["aria-label"] = title
    with box, tag("div", "", "card"):
        with tag("div", "", "card-head"):
            tag("h2", title)
        body = tag("div", "", "card-body")
    return box, body
