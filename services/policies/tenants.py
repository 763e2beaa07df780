"""The tenants document, which assigns policies to tenants."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from services.core.values import TENANTS
from services.policies.document import (
    STORED,
    PolicyDocument,
    PolicyName,
    StrictModel,
    compute_digest,
    is_policy_name,
)

__all__ = ["TENANTS", "TENANTS_LIMIT", "Document", "TenantsDocument", "is_document_name", "parse_document"]

TENANTS_LIMIT: Final = 10_000
TenantName = Annotated[str, Field(min_length=1, max_length=256)]


class TenantsDocument(StrictModel):
    """The policies of tenants, versioned and activated like a policy. There is one, by the name `tenants`."""

    # As in PolicyDocument: a default must never change.
    kind: Annotated[Literal["tenants"], Field(description="kind of the document; required in a file")] = "tenants"
    name: Annotated[Literal["tenants"], Field(description="name of the document")] = TENANTS
    description: Annotated[str, Field(max_length=2000, description="for people")] = ""
    tenants: Annotated[
        dict[TenantName, PolicyName],
        Field(max_length=TENANTS_LIMIT, description="policy name of each tenant; the other tenants get `default`"),
    ] = Field(default_factory=dict)

    def policy_of(self, tenant: str) -> str | None:
        """The name of a tenant's policy; None if the document does not list the tenant."""
        return self.tenants.get(tenant)

    def digest(self) -> str:
        """`sha256:<hex>` of the document's content."""
        return compute_digest(self, kind=self.kind)


Document = PolicyDocument | TenantsDocument


def is_document_name(name: str) -> bool:
    """Whether a policy or the tenants document may have this name."""
    return name == TENANTS or is_policy_name(name)


def parse_document(document: Mapping[str, Any], *, stored: bool = False) -> Document:
    """Validate a document of decoded JSON or YAML. Without a `kind` it is a policy.

    `stored` accepts rules that an earlier release published and this one would refuse.

    Raises:
        pydantic.ValidationError: the document is invalid.
    """
    # A document of an unknown kind fails as a policy, with an error about `kind`.
    model = TenantsDocument if document.get("kind") == TENANTS else PolicyDocument
    return model.model_validate(document, context=STORED if stored else None)
