"""That whatever can be said to the service, and heard from it, is documented where its users look."""

import re

import pytest
from flask import Flask
from services import ROOT
from test_openapi import PARAMETERS, RESPONSES

import cli
from app import SETTINGS
from schemas import RebindRequestSchema

CONTRACT = (ROOT / "docs" / "contract.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("bench/*.py")]
HEADERS = {name for response in RESPONSES.values() for name in response.get("headers", {})}
ALL = "\n".join(page.read_text() for page in PAGES)


def commands() -> dict[str, set[str]]:
    """The options of each of our commands."""
    app = Flask("ours")
    cli.init_app(app)
    ours = app.cli.commands
    return {name: {option for each in ours[name].params for option in each.opts} for name in sorted(ours)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_in_the_readme(setting: str) -> None:
    assert f"| `REBIND_{setting}` |" in README


def test_every_command_and_option_is_on_a_page() -> None:
    missing = [
        f"{command} {option}"
        for command, options in commands().items()
        for option in ["", *options]
        if (option.startswith("--") and not re.search(rf"{option}\b", ALL)) or f"flask {command}" not in ALL
    ]
    assert missing == []


@pytest.mark.parametrize("field", RebindRequestSchema().fields)
def test_every_field_of_the_body_is_in_the_contract(field: str) -> None:
    assert f"| `{field}` |" in CONTRACT


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_in_the_contract(name: str) -> None:
    assert f"`{name}=" in CONTRACT or f"header `{name}`" in CONTRACT


@pytest.mark.parametrize("status", RESPONSES)
def test_every_status_is_in_the_contract(status: str) -> None:
    assert f"| {status} |" in CONTRACT or f"`{status}`" in CONTRACT


@pytest.mark.parametrize("header", sorted(HEADERS))
def test_every_header_is_in_the_contract(header: str) -> None:
    assert f"`{header}`" in CONTRACT


def test_what_is_cited_of_the_contract_is_there() -> None:
    titles = re.findall("^## (.*)$", CONTRACT, re.MULTILINE)
    text = " ".join(" ".join(file.read_text() for file in [*CODE, *PAGES]).split())
    cited = re.findall(r'contract\.md\)?, ((?:"[A-Z][^"]+"(?:, and | and |, )?)+)', text)
    assert {title for titles in cited for title in re.findall('"([^"]+)"', titles)} - {*titles} == set()


def test_no_page_names_a_module_that_is_not_there() -> None:
    a_module = r"`((?:tests/|bench/|examples/)?\w+\.py)`"
    named = {name for page in PAGES for name in re.findall(a_module, page.read_text())}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
