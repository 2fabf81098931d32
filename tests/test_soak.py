from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.soak import Setting, all_settings, run


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(all_settings())
def test_random_settings_keep_every_promise(setting: Setting) -> None:
    assert run(setting)["cases"] == 1


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(all_settings())
def test_many_random_settings_keep_every_promise(setting: Setting) -> None:
    assert run(setting)["cases"] == 1
