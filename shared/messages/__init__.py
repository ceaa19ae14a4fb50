"""Every message Podium puts on the wire or on disk: frozen structs, JSON, additive only.

Unknown fields are ignored and a new field has a default, so that a gateway and a node of different
versions understand each other. `tests/unit/shared/test_messages.py` freezes the schemas.
Times are Unix seconds (UTC) unless a name says otherwise; sizes are bytes.
"""
