"""What crosses the border between supervisor and runner."""

from __future__ import annotations

import base64
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsup.errors import BadAnswer, InvalidRequest
from mlxsup.protocol import MAX_SEED, MOST_PREVIEWS, CompletionChunk, CompletionRequest, Health, Options


class TestSeed:
    @pytest.mark.parametrize("seed", [None, 0])
    def test_one_is_chosen_where_none_is_given(self, seed: int | None) -> None:
        chosen = [CompletionRequest(prompt="p", seed=seed).with_seed().seed for _ in range(200)]
        assert all(number is not None and 0 < number < MAX_SEED for number in chosen)
        assert len(set(chosen)) == 200

    @pytest.mark.parametrize("seed", [1, 7, 2**31, 2**53 - 1])
    def test_one_that_is_given_stays(self, seed: int) -> None:
        request = CompletionRequest(prompt="p", seed=seed)
        assert request.with_seed() == request

    @pytest.mark.parametrize("seed", [-1, 2**53, 2**64, -(2**53)])
    def test_one_out_of_range_is_refused(self, seed: int) -> None:
        with pytest.raises(InvalidRequest, match=str(MAX_SEED - 1)):
            CompletionRequest(prompt="p", seed=seed).with_seed()

    def test_the_request_itself_does_not_change(self) -> None:
        request = CompletionRequest(prompt="p")
        request.with_seed()
        assert request.seed is None


class TestFieldsInUse:
    @pytest.mark.parametrize(
        ("fields", "used"),
        [
            ({}, []),
            ({"negative_prompt": "", "images": [], "seed": None}, []),
            ({"negative_prompt": "n"}, ["negative_prompt"]),
            ({"guidance": 0.0, "steps": 0}, ["guidance", "steps"]),
            ({"width": 64, "height": 64, "seed": 3, "images": [b"x"]}, ["width", "height", "seed", "images"]),
            ({"strength": 0.0, "previews": 0, "metadata": False}, ["strength", "previews", "metadata"]),
            ({"output_format": "png", "output_compression": 0}, ["output_format", "output_compression"]),
            ({"options": Options()}, []),
            ({"options": Options(temperature=0.0, stop=[])}, ["options.temperature", "options.stop"]),
        ],
    )
    def test_those_that_differ_from_their_defaults(self, fields: dict[str, Any], used: list[str]) -> None:
        assert list(CompletionRequest(prompt="p", **fields).fields_in_use()) == used


class TestCheck:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"strength": 0.0},
            {"strength": 1.0},
            {"previews": 0},
            {"previews": MOST_PREVIEWS},
            {"output_compression": 0},
            {"output_compression": 100},
            {"guidance": -1.0, "width": 1, "height": 1, "steps": 1},
            {"negative_prompt": "é\0😀"},
        ],
    )
    def test_what_may_make_sense_passes(self, fields: dict[str, Any]) -> None:
        CompletionRequest(prompt="p", **fields).check()

    @pytest.mark.parametrize(
        ("fields", "param", "range_"),
        [
            ({"strength": -0.01}, "strength", "from 0 to 1"),
            ({"strength": 1.01}, "strength", "from 0 to 1"),
            ({"strength": math.nan}, "strength", "from 0 to 1"),
            ({"strength": math.inf}, "strength", "from 0 to 1"),
            ({"previews": -1}, "previews", f"from 0 to {MOST_PREVIEWS}"),
            ({"previews": MOST_PREVIEWS + 1}, "previews", f"from 0 to {MOST_PREVIEWS}"),
            ({"output_compression": -1}, "output_compression", "from 0 to 100"),
            ({"output_compression": 101}, "output_compression", "from 0 to 100"),
            ({"guidance": math.nan}, "guidance", "finite"),
            ({"width": 0}, "width", "at least 1"),
            ({"height": -64}, "height", "at least 1"),
            ({"steps": 0}, "steps", "at least 1"),
            ({"negative_prompt": "\ud800"}, "negative_prompt", "Unicode"),
        ],
    )
    def test_what_cannot_is_refused_by_its_name(self, fields: dict[str, Any], param: str, range_: str) -> None:
        with pytest.raises(InvalidRequest, match=f"{param} .*{range_}") as caught:
            CompletionRequest(prompt="p", **fields).check()
        assert caught.value.details == {"param": param}


class TestWire:
    def test_what_is_not_given_is_not_sent(self) -> None:
        assert msgspec.json.encode(CompletionRequest(prompt="p")) == b'{"prompt":"p"}'
        assert msgspec.json.encode(CompletionChunk(step=1, total=2)) == b'{"step":1,"total":2}'
        preview = CompletionChunk(step=1, total=2, image="aGk=", preview=True)
        assert msgspec.json.encode(preview) == b'{"image":"aGk=","preview":true,"step":1,"total":2}'

    @given(st.binary(max_size=100), st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
    def test_a_request_comes_back_as_it_was(self, image: bytes, prompt: str) -> None:
        request = CompletionRequest(prompt=prompt, images=[image, b""], options=Options(stop=[prompt]))
        assert msgspec.json.decode(msgspec.json.encode(request), type=CompletionRequest) == request

    def test_a_field_nobody_knows_is_refused(self) -> None:
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"prompt":"p","size":1}', type=CompletionRequest)

    @pytest.mark.parametrize(
        "field", ['"output_format":"gif"', '"output_format":"PNG"', '"metadata":1', '"previews":1.5']
    )
    def test_a_value_of_another_kind_is_refused(self, field: str) -> None:
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"prompt":"p",%b}' % field.encode(), type=CompletionRequest)

    def test_runners_may_say_more_than_we_know(self) -> None:
        assert msgspec.json.decode(b'{"content":"a","new":1}', type=CompletionChunk) == CompletionChunk(content="a")
        assert msgspec.json.decode(b'{"status":"ok","new":1}', type=Health).status == "ok"


class TestPicture:
    @given(st.binary(min_size=1, max_size=200))
    def test_its_bytes(self, picture: bytes) -> None:
        assert CompletionChunk(image=base64.b64encode(picture).decode()).image_bytes() == picture

    @pytest.mark.parametrize("image", ["", "no base64!", "AAA", "é", "AA==AA", "A\nA=", " "])
    def test_what_is_none_is_a_bad_answer(self, image: str) -> None:
        with pytest.raises(BadAnswer):
            CompletionChunk(image=image).image_bytes()
