"""TLS 1.2 and 1.3 on the I/O threads; see tls.pxd for the contract and transport.pxd for what each function does."""

import socket

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy

from aiorch_server._core.openssl cimport *
from aiorch_server._core.request cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.transport cimport *

cdef extern from "<sys/socket.h>" nogil:
    Py_ssize_t recv(int fd, void *buffer, size_t size, int flags)
    Py_ssize_t send(int fd, const void *buffer, size_t size, int flags)
    int MSG_NOSIGNAL

cdef enum:
    FIRST_OUT_BYTES = 4096
    # A server's flight with its chain of certificates, or the answers to whatever a client makes up: never more.
    # The rest of the slack is what 256 KiB of plain bytes grow by when they are cut into records.
    OUT_BYTES = 28672
    SESSION_LIFETIME_S = 3600

cdef const unsigned char *H2 = b"\x02h2"
# gRPC speaks HTTP/2 alone, which forbids most suites of TLS 1.2 (RFC 9113, 9.2.2): these are the ones with forward
# secrecy and authenticated encryption. AES-128 first, as gRPC's own servers have it: as good, and cheaper.
cdef const char *CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"
cdef const char *SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"


# ------------------------------------------------------------------------------------------- the pipe under OpenSSL
cdef int _read_wire(BIO *bio, char *data, int size) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> BIO_get_data(bio)
    cdef size_t n = min(<size_t> size, tls.wire_in_size)
    BIO_clear_retry_flags(bio)
    if n == 0:
        BIO_set_retry_read(bio)
        return -1
    memcpy(data, tls.wire_in, n)
    tls.wire_in += n
    tls.wire_in_size -= n
    return <int> n


cdef int _write_wire(BIO *bio, const char *data, int size) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> BIO_get_data(bio)
    cdef size_t n = <size_t> size
    cdef size_t capacity
    cdef uint8_t *larger
    BIO_clear_retry_flags(bio)
    if tls.wire_out != NULL:
        if n > tls.wire_out_capacity - tls.wire_out_size:
            return -1
        memcpy(tls.wire_out + tls.wire_out_size, data, n)
        tls.wire_out_size += n
        return size
    if n > tls.out_capacity - tls.out_size:
        capacity = max(tls.out_size + n, <size_t> FIRST_OUT_BYTES)
        if capacity > OUT_BYTES:
            return -1
        larger = <uint8_t *> realloc(tls.out, capacity)
        if larger == NULL:
            return -1
        tls.out, tls.out_capacity = larger, capacity
    memcpy(tls.out + tls.out_size, data, n)
    tls.out_size += n
    return size


cdef long _control_wire(BIO *bio, int command, long number, void *pointer) noexcept nogil:
    return command == BIO_CTRL_FLUSH


cdef BIO_METHOD *_make_wire() noexcept nogil:
    cdef BIO_METHOD *method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"aiorch")
    if method != NULL:
        BIO_meth_set_read(method, _read_wire)
        BIO_meth_set_write(method, _write_wire)
        BIO_meth_set_ctrl(method, _control_wire)
    return method


cdef BIO_METHOD *_wire = _make_wire()
if _wire == NULL:
    raise MemoryError


# ---------------------------------------------------------------------------------------------------- one connection
cdef Transport *_open(PortSecurity *security) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> calloc(1, sizeof(TlsTransport))
    cdef BIO *bio = BIO_new(_wire)
    cdef TlsSecurity *shared = <TlsSecurity *> security
    if tls != NULL:
        pthread_mutex_lock(&shared.lock)
        tls.ssl = SSL_new(shared.context)       # holds the context from now on
        pthread_mutex_unlock(&shared.lock)
    if tls == NULL or bio == NULL or tls.ssl == NULL:
        if tls != NULL:
            SSL_free(tls.ssl)
        BIO_free(bio)
        free(tls)
        return NULL
    BIO_set_data(bio, tls)
    BIO_set_init(bio, 1)
    SSL_set_bio(tls.ssl, bio, bio)
    SSL_set_accept_state(tls.ssl)
    tls.base.security = retain_security(security)
    return &tls.base


cdef void _close(Transport *transport, int fd, bint may_write) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> transport
    ERR_clear_error()
    if may_write:
        if transport.is_open and not tls.is_broken:
            SSL_shutdown(tls.ssl)           # close_notify: what was sent is all there is (RFC 8446, 6.1)
        if tls.out_size:
            send(fd, tls.out, tls.out_size, MSG_NOSIGNAL)
    SSL_free(tls.ssl)
    ERR_clear_error()
    release_identity(transport.identity)
    release_security(transport.security)
    free(tls.out)
    free(tls)


cdef PeerIdentity *_identify(SSL *ssl) noexcept nogil:
    """What the handshake has proved; NULL: no memory."""
    cdef PeerIdentity *identity = <PeerIdentity *> calloc(1, sizeof(PeerIdentity))
    cdef X509 *certificate
    cdef unsigned char *der = NULL
    cdef int size = 0
    if identity == NULL:
        return NULL
    identity.references = 1
    identity.is_resumed = SSL_session_reused(ssl) == 1
    certificate = SSL_get1_peer_certificate(ssl)
    if certificate == NULL:
        return identity
    size = i2d_X509(certificate, &der)
    X509_free(certificate)
    if size > 0:
        identity.certificate = <uint8_t *> malloc(<size_t> size)
    if identity.certificate != NULL:
        memcpy(identity.certificate, der, <size_t> size)
        identity.certificate_size = <size_t> size
    OPENSSL_free(der)
    if identity.certificate == NULL:
        free(identity)
        return NULL
    return identity


cdef int _shake_hands(TlsTransport *tls) noexcept nogil:
    """Goes on with the handshake; 1: it is over, 0: the client must say more, -1: refused."""
    cdef const unsigned char *protocol = NULL
    cdef unsigned int size = 0
    cdef int result
    ERR_clear_error()
    result = SSL_do_handshake(tls.ssl)
    if result != 1:
        return 0 if SSL_get_error(tls.ssl, result) == SSL_ERROR_WANT_READ else -1
    tls.base.is_open = True
    SSL_get0_alpn_selected(tls.ssl, &protocol, &size)
    if size != 2 or memcmp(protocol, H2 + 1, 2) != 0:
        return -1               # a client that does not negotiate at all; gRPC's do, as RFC 9113, 3.2 wants it
    tls.base.identity = _identify(tls.ssl)
    return -1 if tls.base.identity == NULL else 1


cdef Py_ssize_t _receive(Transport *transport, int fd, uint8_t *wire, size_t wire_size, uint8_t *plain) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> transport
    cdef size_t capacity = wire_size + WIRE_SLACK_BYTES
    cdef size_t filled = 0
    cdef int result, error
    cdef Py_ssize_t size = recv(fd, wire, wire_size, 0)
    transport.has_more = size == <Py_ssize_t> wire_size
    if size < 0:
        return NOTHING_YET if errno == EAGAIN or errno == EINTR else -1
    if size == 0:
        return 0
    tls.wire_in, tls.wire_in_size = wire, <size_t> size
    if not transport.is_open:
        result = _shake_hands(tls)
        if result < 0:
            tls.is_broken = not transport.is_open       # without a protocol it may still say goodbye
            return -1
        if result == 0:
            return NOTHING_YET
    while True:
        ERR_clear_error()
        result = SSL_read(tls.ssl, plain + filled, <int> (capacity - filled))
        if result <= 0:
            break
        filled += <size_t> result
    error = SSL_get_error(tls.ssl, result)
    if error == SSL_ERROR_ZERO_RETURN:
        transport.has_ended = True
        return <Py_ssize_t> filled
    if error != SSL_ERROR_WANT_READ or tls.wire_in_size:
        tls.is_broken = True
        return -1
    return <Py_ssize_t> filled if filled else NOTHING_YET


cdef Py_ssize_t _seal(Transport *transport, const uint8_t *plain, size_t size, uint8_t *wire) noexcept nogil:
    cdef TlsTransport *tls = <TlsTransport *> transport
    cdef size_t sealed = tls.out_size
    if sealed:
        memcpy(wire, tls.out, sealed)
        free(tls.out)
        tls.out = NULL
        tls.out_size = tls.out_capacity = 0
    if size == 0:
        return <Py_ssize_t> sealed
    tls.wire_out, tls.wire_out_size, tls.wire_out_capacity = wire, sealed, size + WIRE_SLACK_BYTES
    ERR_clear_error()
    if SSL_write(tls.ssl, plain, <int> size) != <int> size:
        tls.is_broken = True
    sealed = tls.wire_out_size
    tls.wire_out = NULL
    return -1 if tls.is_broken else <Py_ssize_t> sealed


# ----------------------------------------------------------------------------------------------------------- one port
cdef void _free(PortSecurity *security) noexcept nogil:
    cdef TlsSecurity *shared = <TlsSecurity *> security
    SSL_CTX_free(shared.context)
    pthread_mutex_destroy(&shared.lock)
    free(security)


cdef int _select_h2(SSL *ssl, const unsigned char **selected, unsigned char *selected_size,
                    const unsigned char *offered, unsigned int offered_size, void *argument) noexcept nogil:
    """RFC 7301, 3.2: who offers protocols, but not ours, is told so with an alert."""
    cdef unsigned int at = 0
    while at < offered_size:
        if offered[at] == 2 and offered_size - at >= 3 and memcmp(offered + at, H2, 3) == 0:
            selected[0], selected_size[0] = H2 + 1, 2
            return SSL_TLSEXT_ERR_OK
        at += 1 + <unsigned int> offered[at]
    return SSL_TLSEXT_ERR_ALERT_FATAL


cdef int _refuse_password(char *buffer, int size, int is_writing, void *argument) noexcept nogil:
    return -1                   # OpenSSL would ask at the terminal


cdef TlsSecurity *_new_security() noexcept nogil:
    """Everything but keys and certificates; NULL: no memory."""
    cdef TlsSecurity *security = <TlsSecurity *> calloc(1, sizeof(TlsSecurity))
    cdef SSL_CTX *context
    if security == NULL:
        return NULL
    if pthread_mutex_init(&security.lock, NULL) != 0:
        free(security)
        return NULL
    security.base.references = 1
    security.base.open, security.base.receive, security.base.seal = _open, _receive, _seal
    security.base.close, security.base.free = _close, _free
    security.context = context = SSL_CTX_new(TLS_server_method())
    if (context == NULL or SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION) != 1
            or SSL_CTX_set_cipher_list(context, CIPHERS) != 1 or SSL_CTX_set_ciphersuites(context, SUITES) != 1):
        _free(&security.base)
        return NULL
    SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE
                        | SSL_OP_PRIORITIZE_CHACHA)
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS)     # an idle connection keeps no 32 KiB
    # Who comes back shows a ticket, sealed with a key that only this process has; the server keeps nothing. One is
    # enough: connections of gRPC are few and long.
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF)
    SSL_CTX_set_session_id_context(context, <const unsigned char *> b"aiorch", 6)
    SSL_CTX_set_timeout(context, SESSION_LIFETIME_S)
    SSL_CTX_set_num_tickets(context, 1)
    SSL_CTX_set_alpn_select_cb(context, _select_h2, NULL)
    return security


cdef str _name_error():
    cdef const char *reason = ERR_reason_error_string(ERR_peek_error())
    ERR_clear_error()
    return (<bytes> reason).decode() if reason != NULL else "unknown error"


cdef object _unusable(str what):
    return ValueError(f"the private key or the certificates are not usable PEM: {what}: {_name_error()}")


cdef class TlsContext:
    """What a secure port of an ``IoThread`` shows and asks for; all PEM.

    TLS 1.2 and later with ALPN ``h2``, no renegotiation, no compression. With ``require_client_auth`` clients must
    show a certificate that ``root_certificates`` vouch for; otherwise they are not asked. Raises ValueError when a key
    or a certificate cannot be used. May serve any number of ports and threads.
    """

    def __cinit__(self, bytes private_key not None, bytes certificate_chain not None, bytes root_certificates=None,
                  bint require_client_auth=False):
        cdef SSL_CTX *context
        if require_client_auth and root_certificates is None:
            raise ValueError("require_client_auth needs root_certificates to check clients against")
        ERR_clear_error()
        self.security = _new_security()
        if self.security == NULL:
            raise MemoryError
        context = self.security.context
        self.add_certificates(certificate_chain, "certificate chain", False)
        self.set_key(private_key)
        if root_certificates is not None:
            self.add_certificates(root_certificates, "root certificates", True)
        if require_client_auth:
            SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)

    def __dealloc__(self):
        if self.security != NULL:
            release_security(&self.security.base)

    @property
    def capsule(self):
        """For ``IoThread.listen``, as long as this object lives."""
        return PyCapsule_New(&self.security.base, b"aiorch.PortSecurity", NULL)

    def renew(self, TlsContext other not None):
        """Connections from now on get what ``other`` was made of; those that are open keep what they have.

        Sessions from before are not resumed: clients see the new certificate, and theirs are checked anew. ``other``
        has what was here, and is of no more use.
        """
        cdef SSL_CTX *context = other.security.context
        if other is self:
            return
        pthread_mutex_lock(&self.security.lock)
        other.security.context, self.security.context = self.security.context, context
        pthread_mutex_unlock(&self.security.lock)

    cdef int set_key(self, bytes pem) except -1:
        cdef BIO *bio = BIO_new_mem_buf(PyBytes_AS_STRING(pem), <int> PyBytes_GET_SIZE(pem))
        cdef EVP_PKEY *key = NULL
        cdef bint is_fitting = False
        if bio != NULL:
            key = PEM_read_bio_PrivateKey(bio, NULL, _refuse_password, NULL)
        BIO_free(bio)
        if key != NULL:
            is_fitting = SSL_CTX_use_PrivateKey(self.security.context, key) == 1
            EVP_PKEY_free(key)
        if not is_fitting or SSL_CTX_check_private_key(self.security.context) != 1:
            raise _unusable("private key")
        return 0

    cdef int add_certificates(self, bytes pem, str what, bint are_roots) except -1:
        """One or more; anything else between them is skipped."""
        cdef SSL_CTX *context = self.security.context
        cdef BIO *bio = BIO_new_mem_buf(PyBytes_AS_STRING(pem), <int> PyBytes_GET_SIZE(pem))
        cdef X509 *certificate
        cdef unsigned long error
        cdef size_t bytes_so_far = 0
        cdef int count = 0
        cdef int result = 1
        if bio == NULL:
            raise MemoryError
        while result == 1:
            certificate = PEM_read_bio_X509(bio, NULL, _refuse_password, NULL)
            if certificate == NULL:
                break
            if are_roots:
                result = X509_STORE_add_cert(SSL_CTX_get_cert_store(context), certificate)
            elif count == 0:
                result = SSL_CTX_use_certificate(context, certificate)
            else:
                result = SSL_CTX_add1_chain_cert(context, certificate)
            bytes_so_far += <size_t> max(0, i2d_X509(certificate, NULL))
            X509_free(certificate)
            count += 1
        BIO_free(bio)
        error = ERR_peek_last_error()
        is_at_end = ERR_GET_LIB(error) == ERR_LIB_PEM and ERR_GET_REASON(error) == PEM_R_NO_START_LINE
        if result != 1 or count == 0 or not is_at_end:
            raise _unusable(what)
        ERR_clear_error()
        if not are_roots and bytes_so_far > OUT_BYTES // 2:
            raise ValueError(f"the certificate chain has {bytes_so_far} bytes; expected at most {OUT_BYTES // 2}")
        return 0


# ----------------------------------------------------------------------------------------------------- certificates
cdef bytes _take_string(const ASN1_STRING *string):
    return PyBytes_FromStringAndSize(<const char *> ASN1_STRING_get0_data(string), ASN1_STRING_length(string))


cdef bytes _find_common_name(X509 *certificate):
    cdef X509_NAME *subject = X509_get_subject_name(certificate)
    cdef int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1)
    cdef unsigned char *text = NULL
    cdef int size
    if at < 0:
        return None
    size = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)))
    if size < 0:
        return None
    try:
        return PyBytes_FromStringAndSize(<const char *> text, size)
    finally:
        OPENSSL_free(text)


cdef list _list_alternatives(X509 *certificate):
    cdef GENERAL_NAMES *names = <GENERAL_NAMES *> X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL)
    cdef void *value
    cdef int kind = 0
    cdef list found = []
    if names == NULL:
        return found
    try:
        for at in range(sk_GENERAL_NAME_num(names)):
            value = GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(names, at), &kind)
            if kind == GEN_DNS:
                found.append(("dns", _take_string(<const ASN1_STRING *> value)))
            elif kind == GEN_EMAIL:
                found.append(("email", _take_string(<const ASN1_STRING *> value)))
            elif kind == GEN_URI:
                found.append(("uri", _take_string(<const ASN1_STRING *> value)))
            elif kind == GEN_IPADD:
                address = _take_string(<const ASN1_STRING *> value)
                family = {4: socket.AF_INET, 16: socket.AF_INET6}.get(len(address))
                if family is not None:
                    found.append(("ip", socket.inet_ntop(family, address).encode()))
    finally:
        GENERAL_NAMES_free(names)
    return found


def read_names(bytes certificate not None):
    """Of a certificate in DER: the first common name, or None, and the alternative names.

    Those are pairs of ``dns``, ``email``, ``uri`` or ``ip`` and the name; other kinds are left out. Raises ValueError
    when it is no certificate.
    """
    cdef const unsigned char *data = <const unsigned char *> PyBytes_AS_STRING(certificate)
    cdef X509 *parsed = d2i_X509(NULL, &data, <long> PyBytes_GET_SIZE(certificate))
    if parsed == NULL:
        raise ValueError(f"no certificate in DER: {_name_error()}")
    try:
        return _find_common_name(parsed), _list_alternatives(parsed)
    finally:
        X509_free(parsed)
        ERR_clear_error()
