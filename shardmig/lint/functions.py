"""
The functions and operators of PostgreSQL that are known to have no effect but their value, by what they promise.

The lists are curated, not generated: a function is here because somebody looked at it. A test holds them against
pg_proc of a real server: each name exists, and none is more volatile than its list says.
"""

from __future__ import annotations

__all__ = [
    "AGGREGATES",
    "CLOCK",
    "COMPARISONS",
    "IMMUTABLE",
    "OPERATORS",
    "OPERATOR_CLASSES",
    "SEQUENCE",
    "SETS",
    "SIDE_EFFECTS",
    "SINCE",
    "SINCE_WITH",
    "STABLE",
    "STRICT",
    "TOTAL",
    "VOLATILE",
    "WINDOWS",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Immutable, and there is no input on which they fail: what an index on an existing table may compute.
TOTAL = _names("""
    lower upper md5 length char_length character_length octet_length bit_length btrim ltrim rtrim reverse initcap
    left right starts_with array_length cardinality array_ndims jsonb_typeof num_nonnulls num_nulls isempty
    lower_inf upper_inf lower_inc upper_inc isfinite
""")

# Immutable: one input, one value, no effect. They may fail, so on existing rows they belong into moves.
IMMUTABLE = TOTAL | _names("""
    abs acos acosd acosh asin asind asinh atan atan2 atan2d atand atanh cbrt ceil ceiling cos cosd cosh cot cotd degrees
    div erf erfc exp factorial floor gamma gcd lcm lgamma ln log log10 min_scale mod pi pow power radians round scale
    sign sin sind sinh sqrt tan tand tanh trim_scale trunc width_bucket to_bin to_hex to_oct

    ascii bit_count casefold chr crc32 crc32c decode encode get_bit get_byte is_normalized like_escape lpad normalize
    overlay parse_ident position quote_ident quote_literal quote_nullable regexp_count regexp_instr regexp_like
    regexp_match regexp_replace regexp_split_to_array regexp_substr repeat replace rpad set_bit set_byte sha224 sha256
    sha384 sha512 similar_to_escape split_part string_to_array strpos substr substring textcat to_ascii translate
    unicode_assigned unistr

    age date_add date_bin date_part date_subtract date_trunc extract justify_days justify_hours justify_interval
    make_date make_interval make_time make_timestamp overlaps timezone to_timestamp

    array_append array_cat array_dims array_fill array_lower array_position array_positions array_prepend
    array_remove array_replace array_reverse array_sort array_to_tsvector array_upper trim_array

    int4range int8range numrange tsrange tstzrange daterange int4multirange int8multirange nummultirange tsmultirange
    tstzmultirange datemultirange multirange range_merge

    json_array_length json_extract_path json_extract_path_text json_object json_strip_nulls json_typeof
    jsonb_array_length jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_path_exists
    jsonb_path_match jsonb_path_query_array jsonb_path_query_first jsonb_pretty jsonb_set jsonb_set_lax
    jsonb_strip_nulls

    json_to_tsvector jsonb_to_tsvector numnode phraseto_tsquery plainto_tsquery setweight strip to_tsquery to_tsvector
    ts_delete ts_filter ts_headline ts_rank ts_rank_cd tsquery_phrase tsvector_to_array websearch_to_tsquery

    abbrev broadcast family host hostmask inet_merge inet_same_family macaddr8_set7bit masklen netmask network
    set_masklen uuid_extract_timestamp uuid_extract_version

    area box center circle diameter height isclosed isopen line lseg npoints path point polygon radius slope width

    bool date float4 float8 int2 int4 int8 interval numeric text time timestamp timestamptz
""")

# Immutable as well, but one call sees or makes several rows: only in queries.
AGGREGATES = _names("""
    any_value array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count covar_pop covar_samp every
    json_agg json_agg_strict json_object_agg jsonb_agg jsonb_agg_strict jsonb_object_agg jsonb_object_agg_strict
    jsonb_object_agg_unique jsonb_object_agg_unique_strict max min mode percentile_cont percentile_disc range_agg
    range_intersect_agg regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy
    stddev stddev_pop stddev_samp string_agg sum var_pop var_samp variance
""")
WINDOWS = _names("""
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
""")
SETS = _names("""
    generate_series generate_subscripts unnest regexp_matches regexp_split_to_table string_to_table
    json_array_elements json_array_elements_text json_each json_each_text json_object_keys json_populate_recordset
    json_to_record json_to_recordset jsonb_array_elements jsonb_array_elements_text jsonb_each jsonb_each_text
    jsonb_object_keys jsonb_path_query jsonb_path_query_tz jsonb_populate_recordset jsonb_to_record jsonb_to_recordset
""")

# Stable: the same within a statement. They depend on settings (time zone, locale) or on how a type prints itself.
STABLE = _names("""
    array_to_json array_to_string concat concat_ws convert_from convert_to enum_first enum_last enum_range format
    json_build_array json_build_object json_populate_record jsonb_build_array jsonb_build_object jsonb_path_exists_tz
    jsonb_path_match_tz jsonb_path_query_array_tz jsonb_path_query_first_tz jsonb_populate_record make_timestamptz
    money pg_collation_for pg_column_size pg_typeof row_to_json to_char to_date to_json to_jsonb to_number
""")

# Stable too, and the same for all rows of a statement: the clock of the transaction or statement.
CLOCK = _names("now statement_timestamp transaction_timestamp")

# Another value at each call, and no effect but that.
VOLATILE = _names("""
    array_sample array_shuffle clock_timestamp gen_random_uuid random random_normal timeofday uuidv4 uuidv7
""")

# A number drawn is gone: judged by whose sequence it is.
SEQUENCE = _names("currval nextval")

# Known to do something. Not needed for safety (what is on no list is refused), but the message can say why.
SIDE_EFFECTS = _names("""
    cursor_to_xml database_to_xml dblink dblink_connect dblink_exec dblink_open dblink_send_query lastval lo_creat
    lo_create lo_export lo_from_bytea lo_import lo_put lo_unlink pg_advisory_lock pg_advisory_lock_shared
    pg_advisory_unlock pg_advisory_unlock_all pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_cancel_backend
    pg_create_restore_point pg_drop_replication_slot pg_export_snapshot pg_file_write pg_logical_emit_message pg_ls_dir
    pg_notify pg_promote pg_read_binary_file pg_read_file pg_reload_conf pg_rotate_logfile pg_sleep pg_sleep_for
    pg_sleep_until pg_stat_file pg_stat_reset pg_switch_wal pg_terminate_backend pg_try_advisory_lock
    pg_try_advisory_lock_shared pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared query_to_xml
    query_to_xml_and_xmlschema query_to_xmlschema schema_to_xml set_config setseed setval table_to_xml ts_rewrite
    ts_stat txid_current pg_current_xact_id
""")

# The first major version that has it; what is not named here is as old as PostgreSQL 12.
SINCE: dict[str, int] = {
    name: version
    for version, names in {
        13: """gcd gen_random_uuid is_normalized jsonb_path_exists_tz jsonb_path_match_tz jsonb_path_query_array_tz
               jsonb_path_query_first_tz jsonb_path_query_tz jsonb_set_lax lcm min_scale normalize trim_scale""",
        14: """bit_count bit_xor date_bin datemultirange int4multirange int8multirange multirange nummultirange
               range_agg range_intersect_agg string_to_table trim_array tsmultirange tstzmultirange unistr""",
        15: "regexp_count regexp_instr regexp_like regexp_substr",
        16: """any_value array_sample array_shuffle date_add date_subtract erf erfc json_agg_strict jsonb_agg_strict
               jsonb_object_agg_strict jsonb_object_agg_unique jsonb_object_agg_unique_strict random_normal""",
        17: "to_bin to_oct unicode_assigned uuid_extract_timestamp uuid_extract_version",
        18: "array_reverse array_sort casefold crc32 crc32c gamma lgamma uuidv4 uuidv7",
    }.items()
    for name in names.split()
}

# The first major version that takes so many arguments, where older ones take fewer.
SINCE_WITH: dict[tuple[str, int], int] = {
    ("generate_series", 4): 16,
    ("json_strip_nulls", 2): 18,
    ("jsonb_strip_nulls", 2): 18,
    ("random", 2): 17,
}

# Null only for null input, so a NOT NULL column may have them as a default.
STRICT = CLOCK | _names("""
    abs ceil concat date_bin date_part date_trunc daterange decode encode extract floor initcap int4range int8range
    json_build_array json_build_object jsonb_build_array jsonb_build_object left length lower lpad make_date
    make_interval make_time make_timestamp make_timestamptz md5 numrange power repeat replace reverse right round rpad
    sha256 sqrt timezone to_timestamp trunc tsrange tstzrange upper
""")

COMPARISONS = _names("= <> != < <= > >=")

# Every operator of pg_catalog but the oddest geometric ones.
OPERATORS = COMPARISONS | _names("""
    + - * / % ^ |/ ||/ @ & | # ~ << >> || ~* !~ !~* ~~ !~~ ~~* !~~* ^@ -> ->> #> #>> @> <@ ? ?| ?& #- @? @@ && &< &>
    -|- <<= >>= <-> !! <<| |>> &<| |&> ~=
""")

_BRIN = _names("""
    int2 int4 int8 float4 float8 numeric date time timetz timestamp timestamptz interval uuid inet oid macaddr macaddr8
""")
OPERATOR_CLASSES = (
    _names("""
        int2_ops int4_ops int8_ops float4_ops float8_ops numeric_ops text_ops varchar_ops bpchar_ops char_ops name_ops
        bool_ops date_ops time_ops timetz_ops timestamp_ops timestamptz_ops interval_ops uuid_ops bytea_ops inet_ops
        cidr_ops macaddr_ops macaddr8_ops oid_ops money_ops bit_ops varbit_ops array_ops jsonb_ops jsonb_path_ops
        range_ops multirange_ops enum_ops tsvector_ops tsquery_ops record_ops text_pattern_ops varchar_pattern_ops
        bpchar_pattern_ops pg_lsn_ops xid8_ops point_ops box_ops circle_ops poly_ops quad_point_ops kd_point_ops
        inet_inclusion_ops range_inclusion_ops box_inclusion_ops
    """)
    | {f"{kind}_{how}_ops" for kind in _BRIN for how in ("minmax", "minmax_multi", "bloom")}
    | {f"{kind}_{how}_ops" for kind in _names("text bpchar bytea char name") for how in ("minmax", "bloom")}
)
