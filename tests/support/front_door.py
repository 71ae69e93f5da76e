"""A contract type of import-linter: other packages import a package only by the modules of its front door.

The built-in type `protected` lists the private modules instead, so that a new module would be open until its name is
added. Here a new module is private until it is named as a door. Registered in `pyproject.toml`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from importlinter import Contract, ContractCheck, fields, output

if TYPE_CHECKING:
    from grimp import ImportGraph
    from importlinter.domain.imports import Module


class FrontDoorContract(Contract):
    """The doors of one package, and who may use them.

    Options: `package`, the package; `doors`, its modules that others may import, by their names in the package;
    `importers`, if only these packages may use the doors. The package itself, its `__init__`, is always open.
    """

    type_name = "front_door"
    # An instance has the parsed values under these names, so their types are not those of the fields.
    package: Module = fields.ModuleField()  # type: ignore[assignment]
    doors: list[str] = fields.ListField(subfield=fields.StringField())  # type: ignore[assignment]
    importers: list[Module] = fields.ListField(  # type: ignore[assignment]
        subfield=fields.ModuleField(), required=False, default=[]
    )

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Collect the imports from outside that do not use a door, and the doors that do not exist."""
        package = self.package.name
        inner = graph.find_descendants(package)
        doors = {f"{package}.{door}" for door in self.doors}
        allowed = {module.name for module in self.importers}
        illegal = [
            f"{importer} imports {imported}"
            for imported in sorted(inner)
            for importer in sorted(graph.find_modules_that_directly_import(imported) - inner - {package})
            if imported not in doors or (allowed and not any(f"{importer}.".startswith(f"{name}.") for name in allowed))
        ]
        missing = [f"{door} does not exist" for door in sorted(doors - inner)]
        return ContractCheck(kept=not illegal and not missing, metadata={"faults": illegal + missing})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one line for each fault."""
        for fault in check.metadata["faults"]:
            output.print_error(fault)
