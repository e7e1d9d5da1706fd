"""
The closed world as data: for every node of PostgreSQL's grammar that may appear, the fields that may be set.

The parser hands out only what is set, so whatever is absent here and present in a text is refused. A node that is not
listed at all has no judge and is refused by whoever meets it.
"""

from __future__ import annotations

__all__ = ["FIELDS"]


def _fields(**kinds: str) -> dict[str, frozenset[str]]:
    return {kind: frozenset(names.split()) for kind, names in kinds.items()}


FIELDS = _fields(
    # expressions
    A_Const="ival fval boolval sval bsval isnull location",
    A_Expr="kind name lexpr rexpr rexpr_list_start rexpr_list_end location",
    A_ArrayExpr="elements list_start list_end location",
    A_Indirection="arg indirection",
    A_Indices="is_slice lidx uidx",
    A_Star="",
    BitString="bsval",
    Float="fval",
    BoolExpr="boolop args location",
    BooleanTest="arg booltesttype location",
    CaseExpr="arg args defresult location",
    CaseWhen="expr result location",
    CoalesceExpr="args location",
    CollateClause="arg collname location",
    ColumnRef="fields location",
    FuncCall="funcname args agg_order agg_filter over agg_within_group agg_star agg_distinct func_variadic funcformat "
    "location",
    GroupingFunc="args location",
    MergeSupportFunc="msftype msfcollid location",
    MinMaxExpr="op args location",
    MultiAssignRef="source colno ncolumns",
    NamedArgExpr="arg name argnumber location",
    NullTest="arg nulltesttype argisrow location",
    RowExpr="args row_format location",
    SetToDefault="location",
    SQLValueFunction="op typmod location",
    SubLink="sub_link_type testexpr oper_name subselect location",
    TypeCast="arg type_name location",
    TypeName="names typmods typemod array_bounds location",
    # queries
    Alias="aliasname colnames",
    CommonTableExpr="ctename aliascolnames ctematerialized ctequery location",
    GroupingSet="kind content location",
    JoinExpr="jointype is_natural larg rarg using_clause join_using_alias quals alias",
    LockingClause="locked_rels strength wait_policy",
    RangeFunction="lateral ordinality is_rowsfrom functions alias coldeflist",
    RangeSubselect="lateral subquery alias",
    RangeTableSample="relation method args repeatable location",
    RangeVar="schemaname relname inh relpersistence alias location",
    ResTarget="name indirection val location",
    ReturningClause="exprs",
    SelectStmt="distinct_clause target_list from_clause where_clause group_clause group_distinct having_clause "
    "window_clause values_lists sort_clause limit_offset limit_count limit_option locking_clause with_clause op all "
    "larg rarg",
    SortBy="node sortby_dir sortby_nulls location",
    WindowDef="name refname partition_clause order_clause frame_options start_offset end_offset location",
    WithClause="ctes recursive location",
    # moves
    InsertStmt="relation cols select_stmt on_conflict_clause returning_clause with_clause override",
    UpdateStmt="relation target_list where_clause from_clause returning_clause with_clause",
    DeleteStmt="relation using_clause where_clause returning_clause with_clause",
    MergeStmt="relation source_relation join_condition merge_when_clauses returning_clause with_clause",
    MergeWhenClause="match_kind command_type override condition target_list values",
    OnConflictClause="action infer target_list where_clause location",
    InferClause="index_elems where_clause conname location",
    # structure
    AlterTableStmt="relation cmds objtype",
    AlterTableCmd="subtype def behavior",
    ColumnDef="colname type_name compression is_local storage_name coll_clause constraints location",
    Constraint="contype conname deferrable initdeferred is_no_inherit raw_expr generated_when generated_kind "
    "nulls_not_distinct keys without_overlaps including exclusions options access_method where_clause pktable fk_attrs "
    "pk_attrs fk_with_period pk_with_period fk_matchtype fk_upd_action fk_del_action fk_del_set_cols is_enforced "
    "initially_valid location",
    CreateStmt="relation table_elts partspec partbound inh_relations constraints options oncommit",
    CreateEnumStmt="type_name vals",
    CreateSeqStmt="sequence options",
    CreateSchemaStmt="schemaname",
    CommentStmt="objtype object comment",
    DefElem="defnamespace defname arg defaction location",
    GrantStmt="is_grant targtype objtype objects privileges grantees grant_option behavior",
    AccessPriv="priv_name cols",
    RoleSpec="roletype rolename location",
    IndexStmt="idxname relation access_method index_params index_including_params options where_clause unique "
    "concurrent nulls_not_distinct",
    IndexElem="name expr indexcolname collation opclass ordering nulls_ordering location",
    PartitionSpec="strategy part_params location",
    PartitionElem="name expr collation opclass location",
    PartitionBoundSpec="strategy is_default modulus remainder listdatums lowerdatums upperdatums location",
)
