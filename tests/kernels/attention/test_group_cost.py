"""The rule for groups follows what was measured."""

import pytest

from flashtensors.kernels.attention.group_cost import does_group_pay

TOKEN_BYTES = 2 * 8 * 128 * 2


@pytest.mark.parametrize(("members", "prefix"), [(4, 8192), (8, 4096), (16, 2048), (64, 1024), (128, 512), (256, 512)])
def test_what_was_quicker_as_a_group_pays(members, prefix):
    assert does_group_pay(members, prefix, TOKEN_BYTES)


@pytest.mark.parametrize(("members", "prefix"), [(1, 1 << 20), (2, 8192), (4, 4096), (8, 1024), (64, 512), (128, 256)])
def test_what_was_slower_does_not(members, prefix):
    assert not does_group_pay(members, prefix, TOKEN_BYTES)


@pytest.mark.parametrize(("members", "prefix"), [(1024, 640), (256, 768)])
def test_samples_of_a_few_prompts_are_groups_with_small_heads_too(members, prefix):
    assert does_group_pay(members, prefix, TOKEN_BYTES // 2)


def test_small_caches_need_more_tokens():
    assert not does_group_pay(8, 4096, TOKEN_BYTES // 4)
    assert does_group_pay(8, 16384, TOKEN_BYTES // 4)
