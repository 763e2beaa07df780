"""Whose policy is whose."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.policies.document import PolicyDocument
from services.policies.tenants import TENANTS_LIMIT, TenantsDocument, parse_document


def test_policy_of_a_listed_tenant_is_found() -> None:
    document = TenantsDocument(tenants={"no": "shop", "007": "children"})
    assert (document.policy_of("no"), document.policy_of("007"), document.policy_of("7")) == ("shop", "children", None)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "shop"},
        {"kind": "policy"},
        {"tenants": {"": "shop"}},
        {"tenants": {"t" * 257: "shop"}},
        {"tenants": {"t": "Shop"}},
        {"tenants": {"t": "shop@3"}},
        {"tenants": {"t": "tenants"}},
        {"tenants": {str(n): "shop" for n in range(TENANTS_LIMIT + 1)}},
        {"colour": "red"},
    ],
)
def test_invalid_tenants_document_is_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TenantsDocument.model_validate(change)


def test_digest_depends_on_content_and_not_on_order() -> None:
    one = TenantsDocument(tenants={"a": "shop", "b": "children"})
    assert one.digest() == TenantsDocument(tenants={"b": "children", "a": "shop"}).digest()
    assert one.digest() != TenantsDocument(tenants={"a": "shop"}).digest()
    assert TenantsDocument().digest() == "sha256:86efc67ec162c8999cd8960aac579e2dbff7f2a6fbda74264ec4bbf5ea1d6464"


def test_kind_selects_the_document_type() -> None:
    assert isinstance(parse_document({"name": "shop"}), PolicyDocument)
    assert isinstance(parse_document({"kind": "policy", "name": "shop"}), PolicyDocument)
    assert isinstance(parse_document({"kind": "tenants"}), TenantsDocument)
    for bad in ({"kind": "tenant", "name": "shop"}, {"kind": ["tenants"]}, {}):
        with pytest.raises(ValidationError):
            parse_document(bad)
