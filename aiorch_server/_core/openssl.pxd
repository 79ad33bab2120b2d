# What tls.pyx uses of OpenSSL 3's libssl and libcrypto.
#
# Which library: the system's, found by pkg-config. Where CPython's _ssl is linked to the same file, the process has it
# once. grpcio and cryptography bring their own inside their modules, export none of its names and are loaded with
# RTLD_LOCAL; the system's names carry versions (SSL_read@OPENSSL_3.0.0): neither can be taken for the other.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t


cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL:
        pass
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct BIO:
        pass
    ctypedef struct BIO_METHOD:
        pass
    ctypedef struct EVP_PKEY:
        pass
    ctypedef struct X509:
        pass
    ctypedef struct X509_STORE:
        pass

    const SSL_METHOD *TLS_server_method()
    SSL_CTX *SSL_CTX_new(const SSL_METHOD *method)
    void SSL_CTX_free(SSL_CTX *context)
    int SSL_CTX_set_min_proto_version(SSL_CTX *context, int version)
    uint64_t SSL_CTX_set_options(SSL_CTX *context, uint64_t options)
    long SSL_CTX_set_mode(SSL_CTX *context, long mode)
    long SSL_CTX_set_session_cache_mode(SSL_CTX *context, long mode)
    long SSL_CTX_set_timeout(SSL_CTX *context, long seconds)
    int SSL_CTX_set_num_tickets(SSL_CTX *context, size_t n)
    int SSL_CTX_set_session_id_context(SSL_CTX *context, const unsigned char *name, unsigned int size)
    int SSL_CTX_set_cipher_list(SSL_CTX *context, const char *ciphers)
    int SSL_CTX_set_ciphersuites(SSL_CTX *context, const char *suites)
    int SSL_CTX_use_certificate(SSL_CTX *context, X509 *certificate)
    int SSL_CTX_add1_chain_cert(SSL_CTX *context, X509 *certificate)
    int SSL_CTX_use_PrivateKey(SSL_CTX *context, EVP_PKEY *key)
    int SSL_CTX_check_private_key(SSL_CTX *context)
    X509_STORE *SSL_CTX_get_cert_store(SSL_CTX *context)
    void SSL_CTX_set_verify(SSL_CTX *context, int mode, void *callback)
    void SSL_CTX_set_alpn_select_cb(
        SSL_CTX *context,
        int (*select)(SSL *ssl, const unsigned char **selected, unsigned char *selected_size,
                      const unsigned char *offered, unsigned int offered_size, void *argument) noexcept nogil,
        void *argument)

    SSL *SSL_new(SSL_CTX *context)
    void SSL_free(SSL *ssl)
    void SSL_set_bio(SSL *ssl, BIO *read_from, BIO *write_to)
    void SSL_set_accept_state(SSL *ssl)
    int SSL_do_handshake(SSL *ssl)
    int SSL_read(SSL *ssl, void *buffer, int size)
    int SSL_write(SSL *ssl, const void *data, int size)
    int SSL_shutdown(SSL *ssl)
    int SSL_get_error(const SSL *ssl, int result)
    int SSL_session_reused(const SSL *ssl)
    void SSL_get0_alpn_selected(const SSL *ssl, const unsigned char **selected, unsigned int *size)
    X509 *SSL_get1_peer_certificate(const SSL *ssl)

    int TLS1_2_VERSION
    uint64_t SSL_OP_NO_RENEGOTIATION
    uint64_t SSL_OP_NO_COMPRESSION
    uint64_t SSL_OP_CIPHER_SERVER_PREFERENCE
    uint64_t SSL_OP_PRIORITIZE_CHACHA
    long SSL_MODE_RELEASE_BUFFERS
    long SSL_SESS_CACHE_OFF
    int SSL_VERIFY_NONE
    int SSL_VERIFY_PEER
    int SSL_VERIFY_FAIL_IF_NO_PEER_CERT
    int SSL_ERROR_WANT_READ
    int SSL_ERROR_ZERO_RETURN
    int SSL_TLSEXT_ERR_OK
    int SSL_TLSEXT_ERR_ALERT_FATAL


cdef extern from "<openssl/bio.h>" nogil:
    BIO *BIO_new(const BIO_METHOD *method)
    BIO *BIO_new_mem_buf(const void *data, int size)
    void BIO_free(BIO *bio)
    void BIO_set_data(BIO *bio, void *data)
    void *BIO_get_data(BIO *bio)
    void BIO_set_init(BIO *bio, int is_ready)
    void BIO_set_retry_read(BIO *bio)
    void BIO_clear_retry_flags(BIO *bio)
    int BIO_get_new_index()
    BIO_METHOD *BIO_meth_new(int type, const char *name)
    int BIO_meth_set_read(BIO_METHOD *method, int (*read)(BIO *bio, char *data, int size) noexcept nogil)
    int BIO_meth_set_write(BIO_METHOD *method, int (*write)(BIO *bio, const char *data, int size) noexcept nogil)
    int BIO_meth_set_ctrl(BIO_METHOD *method, long (*control)(BIO *bio, int command, long number, void *pointer)
                          noexcept nogil)
    int BIO_TYPE_SOURCE_SINK
    int BIO_CTRL_FLUSH


cdef extern from "<openssl/err.h>" nogil:
    void ERR_clear_error()
    unsigned long ERR_peek_error()
    unsigned long ERR_peek_last_error()
    const char *ERR_reason_error_string(unsigned long error)
    int ERR_GET_LIB(unsigned long error)
    int ERR_GET_REASON(unsigned long error)
    int ERR_LIB_PEM


cdef extern from "<openssl/pem.h>" nogil:
    ctypedef int (*pem_password_cb)(char *buffer, int size, int is_writing, void *argument) noexcept nogil
    EVP_PKEY *PEM_read_bio_PrivateKey(BIO *bio, EVP_PKEY **key, pem_password_cb callback, void *argument)
    X509 *PEM_read_bio_X509(BIO *bio, X509 **certificate, pem_password_cb callback, void *argument)
    void EVP_PKEY_free(EVP_PKEY *key)
    int PEM_R_NO_START_LINE


cdef extern from "<openssl/x509v3.h>" nogil:
    ctypedef struct X509_NAME:
        pass
    ctypedef struct X509_NAME_ENTRY:
        pass
    ctypedef struct ASN1_STRING:
        pass
    ctypedef struct GENERAL_NAMES:
        pass
    ctypedef struct GENERAL_NAME:
        pass

    void X509_free(X509 *certificate)
    int X509_STORE_add_cert(X509_STORE *store, X509 *certificate)
    X509 *d2i_X509(X509 **certificate, const unsigned char **data, long size)
    int i2d_X509(X509 *certificate, unsigned char **data)
    X509_NAME *X509_get_subject_name(const X509 *certificate)
    int X509_NAME_get_index_by_NID(const X509_NAME *name, int nid, int last)
    X509_NAME_ENTRY *X509_NAME_get_entry(const X509_NAME *name, int at)
    ASN1_STRING *X509_NAME_ENTRY_get_data(const X509_NAME_ENTRY *entry)
    int ASN1_STRING_to_UTF8(unsigned char **text, const ASN1_STRING *string)
    int ASN1_STRING_length(const ASN1_STRING *string)
    const unsigned char *ASN1_STRING_get0_data(const ASN1_STRING *string)
    void *X509_get_ext_d2i(const X509 *certificate, int nid, int *is_critical, int *at)
    int sk_GENERAL_NAME_num(const GENERAL_NAMES *names)
    GENERAL_NAME *sk_GENERAL_NAME_value(const GENERAL_NAMES *names, int at)
    void GENERAL_NAMES_free(GENERAL_NAMES *names)
    void *GENERAL_NAME_get0_value(const GENERAL_NAME *name, int *kind)
    void OPENSSL_free(void *memory)
    int NID_commonName
    int NID_subject_alt_name
    int GEN_EMAIL
    int GEN_DNS
    int GEN_URI
    int GEN_IPADD
